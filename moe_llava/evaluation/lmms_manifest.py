"""What lmms-eval finds by the entry point `lmms_eval.models`: which class answers to which name. It is read while lmms-eval itself is being
imported, whatever model it is to ask, so the class is not imported here."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="moe_llava", chat_class_path="moe_llava.evaluation.lmms_model.MoeLlava")
