"""Class images from a dataset of the Hugging Face Hub."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from custom_diffusion.data.hub_datasets import captions_of, find_caption_column, find_image_column, import_datasets
from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.sources import Candidate, Source, SourceError
from custom_diffusion.retrieval.words import matching_caption, query_words
from custom_diffusion.text import one_line


class HubDataset(Source):
    """A dataset of the Hugging Face Hub (or a folder that `datasets` can read), streamed, searched by captions.

    Args:
        path: its name, such as "user/dataset", or a folder.
        words: words that a caption must hold; those of the class prompt if None, and any caption will do if empty.
        split: such as "train".
        config: the dataset's configuration, where it has several.
        image_column, caption_column: found by type and name if None. The image column may hold web addresses.

    Raises:
        UserError: where the package is missing.
    """

    def __init__(
        self,
        path: str,
        words: str | None = None,
        split: str = "train",
        config: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        super().__init__()
        self.path, self.words, self.split, self.config = path, words, split, config
        self.image_column, self.caption_column = image_column, caption_column
        self._datasets = import_datasets("--source dataset needs the package datasets")

    def describe(self) -> str:
        """Name and split of the dataset."""
        return f"the dataset {self.path!r}, split {self.split!r}"

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`; in the order of the dataset."""
        words = query_words(class_prompt if self.words is None else self.words)
        try:
            data = self._datasets.load_dataset(self.path, self.config, split=self.split, streaming=True)
            if data.features:
                # The encoded bytes: decoding is for those whose caption fits.
                data = data.decode(False)
            features = dict(data.features or dict.fromkeys(next(iter(data), {})))
            if not features:
                return
            image, caption = self._columns(features, bool(words))
            for number, row in enumerate(data.select_columns(list({image, caption} - {None}))):
                captions = captions_of(row.get(caption), features[caption]) if caption else []
                yield from self._candidates(f"{self.path}#{self.split}/{number}", row.get(image), captions, words)
        except UserError:
            raise
        except Exception as error:  # the package raises its own, the Hub's and the readers' errors
            reason = one_line(str(error)) or type(error).__name__
            raise SourceError(f"the dataset {self.path!r} cannot be read: {reason[:300]}") from error

    def _columns(self, features: Mapping[str, Any], needs_captions: bool) -> tuple[str, str | None]:
        image = self.image_column or find_image_column(features, self._datasets)
        caption = self.caption_column or find_caption_column(features)
        if caption is None and needs_captions:
            # A dataset for classification: the names of its classes say what is to be seen.
            labels = (name for name, feature in features.items() if isinstance(feature, self._datasets.ClassLabel))
            caption = next(labels, None)
        known = f"{self.path!r} has the columns {', '.join(features)}"
        if image is None or image not in features:
            raise UserError(f"{known}, and no {image!r}: choose one with --image_column" if image else
                            f"{known}: name the one with images or their addresses with --image_column")  # fmt: skip
        if caption is None and needs_captions:
            raise UserError(f"{known}: name the one with captions with --caption_column, or take all with --words ''")
        if caption is not None and caption not in features:
            raise UserError(f"{known}, and no {caption!r}: choose one with --caption_column")
        return image, caption

    def _candidates(
        self, origin: str, value: Any, captions: Sequence[str], words: Sequence[str]
    ) -> Iterator[Candidate]:
        """The images of one row, of which there is usually one; a row without any is counted."""
        caption = matching_caption(captions, words) if captions or words else ""
        if caption is None:
            self.left_out["caption without the words" if captions else "no caption"] += 1
            return
        values = value if isinstance(value, list) else [value]
        images = [one for one in values if isinstance(one, (str, bytes, dict, Image.Image)) and one]
        if not images:
            self.left_out["neither address nor image"] += 1
        for number, one in enumerate(images):
            yield from self._candidate(f"{origin}/{number}" if len(images) > 1 else origin, one, caption)

    def _candidate(
        self, origin: str, value: str | bytes | dict[str, Any] | Image.Image, caption: str
    ) -> Iterator[Candidate]:
        address = value.get("url") if isinstance(value, dict) else value
        try:
            image = self._encoded(value)
        except Exception:  # what opens files of the Hub raises the errors of its network and its archives
            self.left_out["cannot be read"] += 1
            return
        if image:
            yield Candidate(origin, caption, image=image)
        elif isinstance(address, str) and address.strip():
            yield Candidate(address.strip(), caption, address.strip())
        else:
            self.left_out["neither address nor image"] += 1

    def _encoded(self, value: str | bytes | dict[str, Any] | Image.Image) -> bytes:
        """The encoded image in a value; nothing where there is none."""
        if isinstance(value, dict):
            path, value = value.get("path"), value.get("bytes") or b""
            if not value and isinstance(path, str) and path:
                with self._datasets.utils.file_utils.xopen(path, "rb") as file:
                    return file.read()
        if isinstance(value, Image.Image):
            file = io.BytesIO()
            value.convert("RGB").save(file, "PNG")
            return file.getvalue()
        return value if isinstance(value, bytes) else b""
