"""The class for each model name, which lmms-eval finds by the entry point `lmms_eval.models`. lmms-eval reads it while it is itself being
imported, for any model, so the class is not imported here."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="moe_llava", chat_class_path="moe_llava.evaluation.lmms_model.MoeLlava")
