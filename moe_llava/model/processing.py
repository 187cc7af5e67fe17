"""Images and text to model inputs: transformers' LLaVA processor, for CLIP and SigLIP towers alike."""

from __future__ import annotations

from typing import Any

from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.processing_utils import MultiModalData


class MoeLlavaProcessor(LlavaProcessor):
    """Each `<image>` in a text becomes as many placeholders as its image makes features.

    Raises ValueError if a batch has more or fewer `<image>` than images.
    """

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """As LlavaProcessor; older versions of transformers do not count."""
        texts = [text] if isinstance(text, str) else text or []
        found = sum(sample.count(self.image_token) for sample in texts)
        given = 0 if images is None else len(make_flat_list_of_images(images))
        if texts and found != given:
            raise ValueError(f"found {found} {self.image_token} tokens and {given} images")
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_llava(cls, processor: LlavaProcessor) -> MoeLlavaProcessor:
        """The processor of a dense LLaVA as one of the sparse model."""
        return cls(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            patch_size=processor.patch_size,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            num_additional_image_tokens=processor.num_additional_image_tokens,
            image_token=processor.image_token,
            chat_template=processor.chat_template,
        )

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        """Placeholders per image, for serving engines. Every image of this model makes the same number, whatever its size.

        LlavaProcessor reads `crop_size`, which SigLIP's image processor does not have.
        """
        if image_sizes is None:
            return MultiModalData()
        size = self.image_processor.crop_size if self.image_processor.do_center_crop else self.image_processor.size
        number = (size["height"] // self.patch_size) * (size["width"] // self.patch_size) + self.num_additional_image_tokens
        if self.vision_feature_select_strategy == "default":
            number -= 1
        return MultiModalData(num_image_tokens=[number] * len(image_sizes), num_image_patches=[1] * len(image_sizes))
