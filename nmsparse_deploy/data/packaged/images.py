"""Packaged sets of images by name, and those of the development data."""

from __future__ import annotations

from pathlib import Path

from nmsparse_deploy.data.packaged import corpora, corpus_folder, development_file

DEVELOPMENT = {"cifar10": "cifar10/{split}.zip", "photos": "photos/photos-256.tar"}
"""Sets that are no part of any package."""


def names() -> list[str]:
    """List the sets that have a name."""
    return [*corpora("images"), *DEVELOPMENT]


def packaged_images(source: str, split: str) -> Path | None:
    """Return the folder or archive of a set of images; None for any other name."""
    if source in DEVELOPMENT:
        return development_file(
            source,
            DEVELOPMENT[source].format(split=split),
            "give a folder of images, or fashion-mnist",
        )
    return corpus_folder(source, "images")
