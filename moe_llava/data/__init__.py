"""LLaVA records: reading and checking them, conversation forms, token ids and labels, batches."""

from moe_llava.data.encode import encode_record

__all__ = ["encode_record"]
