"""Compiled programs' texts, written by hand in the forms that compilers print."""

TPU = """HloModule jit_step

%all-reduce-scatter.7 (input: bf16[768,2048]) -> bf16[96,2048] {
  %input = bf16[768,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %reduce.41 = bf16[768,2048]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %slice = bf16[96,2048]{1,0:T(8,128)(2,1)} dynamic-slice(%reduce.41), dynamic_slice_sizes={96,2048}
}

ENTRY %main (p: bf16[768,2048], q: bf16[96,2048]) -> bf16[96,2048] {
  %p = bf16[768,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[96,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[96,2048]{1,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.7
  %gather = bf16[768,2048]{1,0} all-gather(%q), channel_id=2, replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}
  %again = bf16[768,2048]{1,0} all-gather(%q), channel_id=2, replica_groups=mesh['a'=1,'b'=8] {'b'}, dimensions={0}
  %start = (bf16[96,2048]{1,0:S(1)}, bf16[96,2048]{1,0}, u32[]{:S(2)}) copy-start(%q)
  %done = bf16[96,2048]{1,0:S(1)} copy-done(%start)
  %away = (bf16[96,2048]{1,0:T(8,128)(2,1)S(5)}, bf16[96,2048]{1,0}, u32[]{:S(2)}) copy-start(%q)
  %part = ((bf16[96,2048]{1,0}), bf16[96,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%q), slice={[0:96], [0:64]}
  ROOT %add = bf16[96,2048]{1,0:T(8,128)(2,1)} add(%fusion.1, %q)
}
"""

# Twelve layers: their kernels are cut out of a stack, cast, gathered, multiplied and scattered; outputs are stacked.
GPU = """HloModule jit_step, is_scheduled=true, num_partitions=16

%fused_convert (stack: f32[12,96,768], i: s32[]) -> bf16[1,96,768] {
  %stack = f32[12,96,768]{2,1,0} parameter(0), metadata={scheduling_name="stack"}
  %cast = bf16[12,96,768]{2,1,0} convert(%stack)
  %i = s32[] parameter(1), metadata={scheduling_name="i"}
  %zero = s32[] constant(0)
  ROOT %cut = bf16[1,96,768]{2,1,0} dynamic-slice(%cast, %i, %zero, %zero), dynamic_slice_sizes={1,96,768}
}

%fused_dynamic_update_slice (all: bf16[12,32,768], j: s32[], one: bf16[32,768]) -> bf16[12,32,768] {
  %all = bf16[12,32,768]{2,1,0} parameter(0)
  %one = bf16[32,768]{1,0} parameter(2)
  %as_row = bf16[1,32,768]{2,1,0} bitcast(%one)
  %j = s32[] parameter(1)
  %nought = s32[] constant(0)
  ROOT %put = bf16[12,32,768]{2,1,0} dynamic-update-slice(%all, %as_row, %j, %nought, %nought)
}

%fused_compare (k: s32[]) -> pred[] {
  %k = s32[] parameter(0)
  %layers = s32[] constant(12)
  ROOT %less = pred[] compare(%k, %layers), direction=LT
}

%wrapped_exchange (whole: bf16[8,96]) -> bf16[8,96] {
  %whole = bf16[8,96]{1,0} parameter(0)
  ROOT %exchange = bf16[8,96]{1,0} all-to-all(%whole), channel_id=7, replica_groups=[2,8]<=[16], dimensions={0}
}

%body (param: (s32[], f32[12,96,768], bf16[12,32,768])) -> (s32[], f32[12,96,768], bf16[12,32,768]) {
  %param = (s32[], f32[12,96,768]{2,1,0}, bf16[12,32,768]{2,1,0}) parameter(0)
  %step = s32[] get-tuple-element(%param), index=0
  %kernels = f32[12,96,768]{2,1,0} get-tuple-element(%param), index=1
  %outputs = bf16[12,32,768]{2,1,0} get-tuple-element(%param), index=2
  %loop_convert_fusion = bf16[1,96,768]{2,1,0} fusion(%kernels, %step), kind=kLoop, calls=%fused_convert
  %flat = bf16[96,768]{1,0} bitcast(%loop_convert_fusion)
  %small = bf16[96,768]{1,0} bitcast(%loop_convert_fusion)
  %all-gather-start = ((bf16[96,768]{1,0}, bf16[96,768]{1,0}), (bf16[768,768]{1,0}, /*index=1*/bf16[768,768]{1,0})) \
all-gather-start(%flat, /*index=1*/%small), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=8], \
device_ids=([8,2]T(1,0)) {'axis_1'}, dimensions={0}, use_global_device_ids=true, \
metadata={op_name="jit(step)/while/body/squeeze" scheduling_name="all-gather-start"}
  %all-gather-done = (bf16[768,768]{1,0}, bf16[768,768]{1,0}) all-gather-done(%all-gather-start)
  %kernel = bf16[768,768]{1,0} get-tuple-element(%all-gather-done), index=0
  %bias = bf16[768,768]{1,0} get-tuple-element(%all-gather-done), index=1
  %custom-call.6 = (bf16[32,768]{1,0}, s8[4194304]{0}) custom-call(%kernel, %bias), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1}}
  %product = bf16[32,768]{1,0} get-tuple-element(%custom-call.6), index=0
  %reduce-scatter-start = ((bf16[768,768]{1,0}, bf16[768,768]{1,0}), (bf16[96,768]{1,0}, bf16[96,768]{1,0})) \
reduce-scatter-start(%kernel, %bias), channel_id=3, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  %reduce-scatter-done = (bf16[96,768]{1,0}, bf16[96,768]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %loop_dynamic_update_slice_fusion = bf16[12,32,768]{2,1,0} fusion(%outputs, %step, %product), kind=kLoop, \
calls=%fused_dynamic_update_slice
  ROOT %next = (s32[], f32[12,96,768]{2,1,0}, bf16[12,32,768]{2,1,0}) tuple(%step, %kernels, \
%loop_dynamic_update_slice_fusion)
}

%condition (state: (s32[], f32[12,96,768], bf16[12,32,768])) -> pred[] {
  %state = (s32[], f32[12,96,768]{2,1,0}, bf16[12,32,768]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%count), kind=kLoop, calls=%fused_compare
}

ENTRY %main (p: f32[12,96,768], q: bf16[12,32,768], r: bf16[8,96]) -> bf16[12,32,768] {
  %p = f32[12,96,768]{2,1,0} parameter(0)
  %q = bf16[12,32,768]{2,1,0} parameter(1)
  %r = bf16[8,96]{1,0} parameter(2)
  %none = s32[] constant(0)
  %tuple.1 = (s32[], f32[12,96,768]{2,1,0}, bf16[12,32,768]{2,1,0}) tuple(%none, %p, %q)
  %while.1 = (s32[], f32[12,96,768]{2,1,0}, bf16[12,32,768]{2,1,0}) while(%tuple.1), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"12"},"known_init_step":{"init":"0","step":"1"},"dynamic_variables":[]}
  %async-start = ((bf16[8,96]{1,0}), bf16[8,96]{1,0}) async-start(%r), calls=%wrapped_exchange
  %async-done = bf16[8,96]{1,0} async-done(%async-start), calls=%wrapped_exchange
  %all-reduce-start = bf16[8,96]{1,0} all-reduce-start(%async-done), channel_id=5, \
replica_groups=mesh['axis_0'=16] {'axis_0'}, use_global_device_ids=true, to_apply=%add
  %all-reduce-done = bf16[8,96]{1,0} all-reduce-done(%all-reduce-start)
  %permute = (bf16[8,96]{1,0}, bf16[8,96]{1,0}) collective-permute-start(%all-reduce-done), channel_id=6, \
source_target_pairs={{0,1},{7,8},{8,9}}
  %permuted = bf16[8,96]{1,0} collective-permute-done(%permute)
  ROOT %result = bf16[12,32,768]{2,1,0} get-tuple-element(%while.1), index=2
}
"""
