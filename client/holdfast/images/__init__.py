"""Volumes of recovery points, readable anywhere at once: nothing is restored, blocks come as they are asked for."""

from holdfast.images.blocking import BlockingImage, ImageFile, runner_on
from holdfast.images.point_image import CACHE_BYTES_DEFAULT, READ_AHEAD_BYTES_DEFAULT, PointImage

__all__ = ["CACHE_BYTES_DEFAULT", "READ_AHEAD_BYTES_DEFAULT", "BlockingImage", "ImageFile", "PointImage", "runner_on"]
