"""Images in, batches out: numpy and grain, never models."""

from gigatok_jax.data.array_record import ArrayRecordSet
from gigatok_jax.data.decode import BadRecord, decode_image
from gigatok_jax.data.elements import CROPS, ImageElement, TokenElement, element
from gigatok_jax.data.evaluation import Tiles, eval_batches, eval_crops
from gigatok_jax.data.pipeline import NoUsableImages, TrainLoader, fingerprint, sample_ids
from gigatok_jax.data.records import Encoded, EncodedSource, Record, Source
from gigatok_jax.data.sources import SOURCES, ImageFolder, Photographs, make_source
from gigatok_jax.data.tokens import TokenRecord, TokenSet
from gigatok_jax.data.transforms import adm_center_crop, adm_random_crop, horizontal_flip, random_scale_crop
from gigatok_jax.data.webdataset import TarImages

__all__ = [
    "CROPS",
    "SOURCES",
    "ArrayRecordSet",
    "BadRecord",
    "Encoded",
    "EncodedSource",
    "ImageElement",
    "ImageFolder",
    "NoUsableImages",
    "Photographs",
    "Record",
    "Source",
    "TarImages",
    "Tiles",
    "TokenElement",
    "TokenRecord",
    "TokenSet",
    "TrainLoader",
    "adm_center_crop",
    "adm_random_crop",
    "decode_image",
    "element",
    "eval_batches",
    "eval_crops",
    "fingerprint",
    "horizontal_flip",
    "make_source",
    "random_scale_crop",
    "sample_ids",
]
