"""Every published model's tensors at full size: ours are the published code's, key for key and shape for shape."""

import hashlib
import math

import pytest

from gigatok_jax import config
from gigatok_jax.hub import keymap, models, sections
from gigatok_jax.hub.layouts import LAYOUTS
from tests.tiny import config_module

# Tensors, parameters, and the SHA-256 of the sorted lines "key (shape)" of the published code's state dicts, without
# the buffers that are dropped: GigaTok's at 182920c built on PyTorch's meta device, LlamaGen's at ce98ec4. TiTok's at
# 942a96f is known by patterns, shapes and counts (`test_maskgit_vqgan_golden.py` compares those); the sum is of ours.
GIGATOK = {
    "s-s": (537, 136_073_227, "3c259c2c1562652e560067a426c1eae7009bb70b28f8333671987a90fd9518c1"),
    "s-s headless": (531, 129_252_619, "dba3140e19188afb6a2a7773ed68fc6787d810f124dae53e752262fc12bc1b55"),
    "s-b": (645, 232_399_627, "5c5e3b153b7492c39ae61f06ad5eabec68a08c9559c9fd0dad9de1cbd94da3f2"),
    "s-b headless": (639, 218_236_939, "5e2701b1d1fdf727da675c4bb8c629a1f59b0856204334a4753d8f8450080678"),
    "b-l": (969, 621_637_131, "c7b2c1892964b85851d2453d716f057347da0d25728f52df73b3a3f357fb0aa8"),
    "b-l headless": (963, 597_510_923, "23a183464c0dfac371b9c99e4bf043006ca111e80e8ed887b2ddce645b6ad691"),
    "b-l-dino-disc": (969, 621_637_131, "c7b2c1892964b85851d2453d716f057347da0d25728f52df73b3a3f357fb0aa8"),
    "b-l-dino-disc headless": (963, 597_510_923, "23a183464c0dfac371b9c99e4bf043006ca111e80e8ed887b2ddce645b6ad691"),
    "b-l-new": (969, 621_637_131, "c7b2c1892964b85851d2453d716f057347da0d25728f52df73b3a3f357fb0aa8"),
    "b-l-new headless": (963, 597_510_923, "23a183464c0dfac371b9c99e4bf043006ca111e80e8ed887b2ddce645b6ad691"),
    "xl-xxl": (1833, 2_893_970_443, "18cbd304d8515d2b05ee3b59eea05934ee58ff296b5ff3814c0d60475708086f"),
    "xl-xxl headless": (1827, 2_842_052_875, "ce781b6490b0cb3519333c909d3a97a95ac081a1b577ce0185b38f55cdbf1998"),
    "2d-s-s": (533, 135_548_427, "609381ca2b0471bfa6bc46a7db0d634b9c621a711ec1d4485bc48985aeba4092"),
    "2d-s-s headless": (527, 128_727_819, "457dd3420f15f74718493314789f3693ce90bb7312710bd7fa2773646adfdcd9"),
    "2d-s-b": (533, 197_132_555, "14d2c89dfcfd7f65b5026f4c8f0b074017876b1fde72e5bc59eaf680c6c78399"),
    "2d-s-b headless": (527, 182_969_867, "e29fd0bdf2a8cced82ec7a441f46e7d202ea96161de9f41dfd7ed4b36bb08fc8"),
    "2d-b-l": (749, 491_410_187, "e85b437c45cbc224f78b1085aaf9a18c1b4f1de0fd4bcb8c6c19e7ce742d8a65"),
    "2d-b-l headless": (743, 467_283_979, "4e0c68dd052dd3e5fdd802e18289cb91f3ffb124982a1d670f131b1256740d98"),
}
GPT = {
    "b": (89, 111_085_824, "bd0a50147ef2b96488c07ef788420155e2bf722a055bebdff32fa22652327b59"),
    "b qk_norm": (137, 111_088_896, "881ba08eee8af7444922d3c806d5cc260c272b00135652ca6ad06ac009419bf6"),
    "b adaln": (115, 154_789_632, "cb16802a0796c71e95704a0748a3bbec93c936a27d8c671a6baf87c3b6865a1b"),
    "b shared_adaln": (105, 115_865_856, "1893e23cbfbb258c4b7f206e7d94fa416118113e893a91411d629ee6560e733d"),
    "l": (173, 343_174_144, "342d58c9bf596c75b6df519e757b602ab3a3bc1c1f41d2b95026066344e5bc50"),
    "xl": (257, 775_028_480, "27451a6944336068fb9135673d6138859e0137fe4dfab8b47ba2988c61f241ec"),
    "xxl": (341, 1_411_367_424, "7ed229e5c91cfcde77a17c6a879adab12c625ac74b87a9f64b3f316febff72e6"),
    "xxxl": (341, 3_893_685_760, "c58ae3d6a6e2f0698f162f2f8d8d132ecace9decccebb56249dc212986e4bbf2"),
    "1b": (159, 1_200_142_336, "04e35ffb4b0e305453395f9d71d204ae6fb24ccf8671becc1b492b18e64cc5ce"),
    "3b": (173, 3_097_481_600, "b2588ef3701a5feadb617f067b1f1fce9e29b0463b2e4a32a65861afbc1b5d44"),
    "7b": (229, 6_615_642_112, "31ecbc0c4a2c6715aa82ac2c74e696694ea143caf3dc42d6156527db9d0bf707"),
}
JUDGES = {
    "patchgan": (19, 2_767_425, "094aca850fc41cfd359574555dfcca79dd7818465d746ac5535da09408d46350"),
    "dino": (80, 7_411_210, "e41dd44b5bf8b66d55ba328b590c6f449c1416247fee1e8d8a27c32645ddd312"),
}
LLAMAGEN = {
    "vq-16": (343, 71_883_403, "5324ab6f1aa4885c9b932afde773324df917d13f8d119a38f179b626dd6a48ff"),
    "vq-8": (299, 70_109_835, "4ffead2d8d0366ec638bc1f0fa62d336f970ed59a67dc551f4486a6e1b6d34d9"),
    "b": (88, 110_888_448, "12e5d11bd5cc18db8d1783ab8e6a4c4e2ebe08787d79cef0e1ede629afe05b0c"),
    "l": (172, 342_910_976, "2ae6d209f51886cdf26f3fb8bd186cb11ee903731172ffc1ed9b0b3c21ef6d96"),
    "xl": (256, 774_699_520, "1aea0fc0dfe17e98117f152a32f69293595bbc500c6967ee2e30c790372a8a26"),
    "xxl": (340, 1_410_972_672, "a8c2eed26f5c444e06eb01729003ec0ed191e931fb2356719d6e2613406682d8"),
    "xxxl": (340, 3_893_027_840, "27c5a69a3a0bd8d22bc0e14aa349b193251b1a73d8a2fe7fc6f5045bdc09432d"),
    "1b": (158, 1_199_616_000, "832e0b0f48cf582271fc1d8554b01be6ac677834f2ee3125b223621876f40b6e"),
    "3b": (172, 3_096_659_200, "9671d5ac9f506bb03ac553c055bcfe49bddbfc66ca3382be42e4db5cdba67696"),
    "7b": (228, 6_614_589_440, "074007d4cc712c055ead2321f53717f68095dd55657c8cc71157960f8b3fcebf"),
}
MASKGIT_VQGAN = (168, 54_515_587, "239280e7734538e2e39425f4c7651760a31b9e8f030b9d35e0c54fda52d8107b")
# TiTok's at 942a96f, ImageBert without a tie of its head to the table of ids (its transformers of that time had none).
MASKED = {
    "l-32": (391, 177_202_432, "df0236acf4c2faed018e54149278c8a23adf06e06054b3d9501dd15ebd9b497d"),
    "b-64": (391, 177_227_008, "e0f33a9a1aea634228419a0a678d82431b2d883385f21009c063f0bcbef113d3"),
    "s-128": (257, 294_990_848, "89b54d0b47830fae87a020ed161b8caae16124b157defd50f028fcfac1b3081a"),
}


def check(layout, section, published):
    """The key list of a section is the published one, its leaves are the model's, and its shapes tell what it is."""
    entries = LAYOUTS[layout].keys.entries(section)
    text = "\n".join(sorted(f"{entry.key} {entry.shape}" for entry in entries))
    count = sum(math.prod(entry.shape) for entry in entries)
    assert (len(entries), count, hashlib.sha256(text.encode()).hexdigest()) == published
    keymap.check_leaves(entries, sections.parameter_shapes(LAYOUTS[layout].kind, section))
    read = models.section_of(layout, {entry.key: entry.shape for entry in entries}, {})
    sizes, known = models.recognised(layout, read)
    assert known and sizes == {field: read[field] for field in sizes} == {field: section[field] for field in sizes}


def plain(section):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in section.to_dict().items()}


@pytest.mark.parametrize("name", GIGATOK)
def test_tokenizers_of_gigatok(name):
    size, *headless = name.split()
    check(
        "gigatok",
        plain(config_module("gigatok").get_config(size).tokenizer) | ({"teacher_dim": 0} if headless else {}),
        GIGATOK[name],
    )


@pytest.mark.parametrize("name", GPT)
def test_generators_of_gigatok(name):
    size, *modulation = name.split()
    changes = (
        {"qk_norm": True} if modulation == ["qk_norm"] else {"modulation": modulation[0] if modulation else "none"}
    )
    check("gigatok-gpt", plain(config.ar_generator(size)) | changes, GPT[name])


@pytest.mark.parametrize("size", MASKED)
def test_masked_generators_of_titok(size):
    section = plain(config.masked_generator(size))
    check("titok-uvit" if section["architecture"] == "uvit" else "titok-imagebert", section, MASKED[size])


@pytest.mark.parametrize("name", JUDGES)
def test_discriminators(name):
    section = {"patchgan": {"base_channels": 64, "num_layers": 3}, "dino": {"width": 384, "num_heads": 5}}[name]
    check("gigatok-patchgan" if name == "patchgan" else "gigatok-dino-disc", {"family": name} | section, JUDGES[name])


@pytest.mark.parametrize("size", LLAMAGEN)
def test_models_of_llamagen(size):
    if size.startswith("vq"):
        check("llamagen", plain(config_module("llamagen").get_config(size).tokenizer), LLAMAGEN[size])
    else:
        check("llamagen-gpt", plain(config.ar_generator(size)) | {"positions": "rope_2d"}, LLAMAGEN[size])


def test_the_tokenizer_that_titok_reads():
    check("maskgit-vqgan", plain(config.maskgit_vqgan_tokenizer()), MASKGIT_VQGAN)


def test_layers_are_counted_by_their_numbers():
    keys = ["layers.0.w", "layers.0.b", "layers.11.w", "layers.2.w", "norm.w", "other.layers.7.w", "layers.x.w"]
    assert keymap.count(keys, r"layers\.(\d+)\.") == 3 and keymap.count(keys, r"blocks\.(\d+)\.") == 0
