"""From records to batches: files, chat templates, token ids and labels."""

from moe_llava.data.encode import encode_record

__all__ = ["encode_record"]
