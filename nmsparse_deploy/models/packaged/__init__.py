"""Models that come with a package of this machine's package index: where they lie once they are
here."""

from __future__ import annotations

from nmsparse_deploy.errors import NmsparseError
from nmsparse_deploy.models.packaged import visual_saliency
from nmsparse_deploy.system.assets import Asset, assets, fetch


def packaged_model(source: str) -> Asset | None:
    """Return the packaged model that MODEL names, if it names one."""
    asset = assets().get(source)
    return asset if asset is not None and asset.kind == "model" else None


def location(asset: Asset) -> str:
    """Return the folder or file of a packaged model, or its name on the hub where the package
    cannot be had."""
    try:
        folder = fetch(asset.key)
    except NmsparseError:
        if asset.hub is None:
            raise
        return asset.hub
    if asset.key == visual_saliency.KEY:
        return str(visual_saliency.model_folder())
    return str(next((file.parent for file in folder.rglob("config.json")), folder / asset.files[0]))
