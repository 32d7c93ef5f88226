"""What a program reads and writes, against sums by hand."""

from gigatok_jax.scaling.traffic import memory_traffic
from tests.scaling.programs import GPU, TPU


def test_a_tpu():
    size, part = 768 * 2048 * 2, 96 * 2048 * 2
    # The fusion reads p, the gathers read q and write all, the sum reads q and writes a part, the copies to on-chip
    # and host memory read q.
    assert memory_traffic(TPU) == size + 2 * (part + size) + 2 * part + 2 * part + 96 * 64 * 2


def test_a_gpu():
    kernel, shard, row, small = 768 * 768 * 2, 96 * 768 * 2, 32 * 768 * 2, 8 * 96 * 2
    cut = 2 * shard + 4 + shard  # float32 in, bfloat16 out, and where
    gather = 2 * shard + 2 * kernel
    product = 2 * kernel + row  # without its scratch space
    put = row + 4 + row  # in place
    condition = 4 + 1
    # all-to-all, all-reduce and permute, each once
    assert memory_traffic(GPU) == 12 * (cut + gather + product + gather + put) + 12 * condition + 3 * 2 * small


FUSED = """HloModule m

%inside (a: f32[64,128], b: f32[64,128], c: f32[64,128]) -> (f32[8,128], f32[64,128]) {{
  %a = f32[64,128]{{1,0}} parameter(0)
  %b = f32[64,128]{{1,0}} parameter(1)
  %c = f32[64,128]{{1,0}} parameter(2)
  %sum = f32[64,128]{{1,0}} add(%a, %b)
  %cut = f32[8,128]{{1,0}} slice(%sum), slice={{[0:8], [0:128]}}
  %zero = s32[] constant(0)
  %put = f32[64,128]{{1,0}} dynamic-update-slice(%c, %cut, %zero, %zero)
  {more}
  ROOT %both = (f32[8,128]{{1,0}}, f32[64,128]{{1,0}}) tuple(%cut, %{second})
}}

ENTRY %main (x: f32[64,128], y: f32[64,128], z: f32[64,128]) -> (f32[8,128], f32[64,128]) {{
  %x = f32[64,128]{{1,0}} parameter(0)
  %y = f32[64,128]{{1,0}} parameter(1)
  %z = f32[64,128]{{1,0}} parameter(2)
  ROOT %fusion = (f32[8,128]{{1,0}}, f32[64,128]{{1,0}}) fusion(%x, %y, %z), kind=kLoop, calls=%inside
}}
"""


def test_a_fusion_reads_what_it_needs():
    whole, part = 64 * 128 * 4, 8 * 128 * 4
    assert memory_traffic(FUSED.format(more="", second="put")) == 2 * part + part + part
    # Used further, the updated buffer is read and written whole.
    more = "%twice = f32[64,128]{1,0} add(%put, %put)"
    assert memory_traffic(FUSED.format(more=more, second="twice")) == 2 * part + part + 2 * whole
    # So is what is summed beside being cut.
    more = "%total = f32[64,128]{1,0} multiply(%a, %c)"
    assert memory_traffic(FUSED.format(more=more, second="total")) == whole + part + whole + part + whole
