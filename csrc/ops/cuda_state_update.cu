// Launcher of the decode step: checks, threads for a row of states, the width of accesses, launch.

#include <algorithm>

#include "kernels/state_update.cuh"
#include "ops/cuda_arguments.h"
#include "ops/cuda_device.h"
#include "ops/cuda_launch.h"
#include "ops/cuda_launchers.h"

namespace shedder {
namespace {

constexpr const char *kStepOp = "state_update";

// Strides of (batch or slot, head, place), of which Mamba-1 has no head.
StepStrides step_strides(const Tensor &t, bool single_head) {
    return single_head ? StepStrides{t.stride(0), 0, t.stride(1)}
                       : StepStrides{t.stride(0), t.stride(1), t.stride(2)};
}

// Of one kind of tasks. False where there are more than `most` warps of them, or lanes too few for a row.
template <typename Input, typename State, int kWidth, int kOwn, int kRows, bool kTied>
bool launch_step_of(StateUpdateParams &p, int64_t most, cudaStream_t stream) {
    p.lane_bits = 0;
    while ((kOwn << p.lane_bits) < p.dstate) ++p.lane_bits;
    if (p.lane_bits > 5) return false;
    const int64_t rows = 32 >> p.lane_bits, run = kTied ? rows * kRows : rows, runs = (p.headdim + run - 1) / run;
    const int64_t batches = kTied ? p.batch : (p.batch + kRows - 1) / kRows, tasks = batches * p.heads * runs;
    if (tasks > most) return false;
    p.by_runs = Divisor(static_cast<unsigned>(runs));
    p.by_heads = Divisor(static_cast<unsigned>(p.heads));
    const unsigned blocks = blocks_for(kStepOp, tasks, kStepThreads / 32);
    launch_ctas(state_update_step<Input, State, kWidth, kOwn, kRows, kTied>, {blocks, kStepThreads}, stream, p);
    return true;
}

// Rows of a thread, measured at B128: four tied ones (H80 P64 N128: 125 us; two 153, eight 135), else two (D5120 N16: 34 us;
// one the same, four 40). Single accesses hold each number in a register of its own: two.
template <typename Input, typename State, int kWidth>
void launch_step(StateUpdateParams &p, bool tied, int32_t device, cudaStream_t stream) {
    constexpr int kTiedRows = kWidth > 1 ? 4 : 2, kRows = 2, kFewOwn = std::max(kWidth, kFewStepStates);
    constexpr int64_t kFew = 12, kMost = (int64_t{1} << 31) - 1;             // warps of a multiprocessor; of a launch
    if (tied && launch_step_of<Input, State, kWidth, kFewOwn, 1, true>(p, kFew * multiprocessors(device), stream)) return;
    const bool launched = tied
        ? launch_step_of<Input, State, kWidth, kStepStates, kTiedRows, true>(p, kMost, stream)
        : launch_step_of<Input, State, kWidth, kStepStates, kRows, false>(p, kMost, stream);
    STD_TORCH_CHECK(launched, "shedder_cuda::state_update: the tensors are too large");
}

// Rows of the batch for a CTA: so many that all CTAs run at once, where that is possible.
template <typename Input, typename State, int kExact>
void launch_channels(StateUpdateParams &p, int32_t device, cudaStream_t stream) {
    const auto kernel = state_update_channels<Input, State, kExact>;
    static int64_t slots = 0;                                // CTAs that run at once; asking takes longer than a launch
    if (slots == 0) {
        int resident = 0;
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kStepThreads, 0);
        slots = int64_t{std::max(resident, 1)} * multiprocessors(device);
    }
    const int64_t tiles = (p.headdim + kStepThreads - 1) / kStepThreads;
    p.rows = static_cast<int>((p.batch * tiles + slots - 1) / slots);
    const dim3 blocks(static_cast<unsigned>(tiles), (p.batch + p.rows - 1) / p.rows);
    launch_ctas(kernel, {blocks, kStepThreads}, stream, p);
}

}  // namespace

void state_update(Tensor state, const Tensor &x, const Tensor &dt, const Tensor &A, const Tensor &B, const Tensor &C,
                  const MaybeTensor &D, const MaybeTensor &z, const MaybeTensor &dt_bias, bool dt_softplus,
                  const MaybeTensor &head_to_group, const MaybeTensor &state_batch_indices, Tensor y) {
    const Arguments arguments{kStepOp, x.get_device_index()};
    const bool single = state.dim() == 3;                    // Mamba-1: its channels are the places of one head
    STD_TORCH_CHECK((single || state.dim() == 4) && x.dim() == state.dim() - 1 && A.dim() == x.dim()
                        && (B.dim() == 2 || B.dim() == 3),
                    "shedder_cuda::state_update takes state (slots, H, P, N), x (B, H, P), A (H, P, N), B (B, G, N), "
                    "or the same without H; B also without G");
    const int64_t batch = x.size(0), heads = single ? 1 : x.size(1), headdim = x.size(single ? 1 : 2);
    const bool one_group = B.dim() == 2;
    const int64_t groups = one_group ? 1 : B.size(1), dstate = state.size(single ? 2 : 3);
    STD_TORCH_CHECK(1 <= dstate && dstate <= 256, "shedder_cuda::state_update: N is ", dstate, "; accepted: 1..256");
    STD_TORCH_CHECK(headdim < (int64_t{1} << 31) - 256, "shedder_cuda::state_update: P is ", headdim,
                    "; accepted: below 2^31");
    STD_TORCH_CHECK(state_batch_indices || state.size(0) >= batch, "shedder_cuda::state_update: state has ",
                    state.size(0), " slots for a batch of ", batch);
    const ScalarType dtype = x.scalar_type();
    StateUpdateParams p{};
    const auto check_shapes = [&](auto rows, auto units, auto states, auto BC_shape) {
        arguments.check(x, "x", rows);
        arguments.check(state, "state", states);
        arguments.check(B, "B", dtype, BC_shape);
        arguments.check(C, "C", dtype, BC_shape);
        arguments.check(y, "y", dtype, rows);
        p.dt = arguments.parameter(dt, "dt", rows);
        p.D = arguments.floats(D, "D", units);
        p.dt_bias = arguments.floats(dt_bias, "dt_bias", units);
        if (z) arguments.check(*z, "z", dtype, rows);
    };
    using Shape = std::initializer_list<int64_t>;
    const Shape BC_flat = {batch, dstate}, BC_groups = {batch, groups, dstate};
    const Shape flat = {batch, headdim}, by_head = {batch, heads, headdim};
    const Shape flat_unit = {headdim}, head_unit = {heads, headdim};
    const Shape flat_state = {state.size(0), headdim, dstate}, head_state = {state.size(0), heads, headdim, dstate};
    const Shape flat_A = {headdim, dstate}, head_A = {heads, headdim, dstate};
    check_shapes(single ? flat : by_head, single ? flat_unit : head_unit, single ? flat_state : head_state,
                 one_group ? BC_flat : BC_groups);
    p.A = arguments.floats(A, "A", single ? flat_A : head_A);
    STD_TORCH_CHECK(y.is_contiguous(), "shedder_cuda::state_update: y is not contiguous");

    p.state = state.mutable_data_ptr();
    p.y = y.mutable_data_ptr();
    p.x = x.const_data_ptr();
    p.B = B.const_data_ptr();
    p.C = C.const_data_ptr();
    if (groups > 1) {
        STD_TORCH_CHECK(head_to_group, "shedder_cuda::state_update: head_to_group is needed for more than one group");
        p.group_per_place = heads == 1 && head_to_group->size(0) == headdim;
        p.head_to_group = arguments.integers(head_to_group, "head_to_group", {p.group_per_place ? headdim : heads});
        p.map_stride = head_to_group->stride(0);
    }
    p.slots = arguments.integers(state_batch_indices, "state_batch_indices", {batch});
    p.slots_stride = state_batch_indices ? state_batch_indices->stride(0) : 0;
    p.state_strides = step_strides(state, single);
    p.state_n_stride = state.stride(single ? 2 : 3);
    p.x_strides = step_strides(x, single);
    p.dt_strides = step_strides(dt, single);
    if (z) {
        p.z = z->const_data_ptr();
        p.z_strides = step_strides(*z, single);
    }
    p.A_strides = single ? StepStrides{0, 0, A.stride(0)} : StepStrides{0, A.stride(0), A.stride(1)};
    p.A_n_stride = A.stride(single ? 1 : 2);
    p.B_batch_stride = B.stride(0);
    p.C_batch_stride = C.stride(0);
    p.B_group_stride = one_group ? 0 : B.stride(1);
    p.C_group_stride = one_group ? 0 : C.stride(1);
    p.B_n_stride = B.stride(one_group ? 1 : 2);
    p.C_n_stride = C.stride(one_group ? 1 : 2);
    if (D) {
        p.D_head_stride = single ? 0 : D->stride(0);
        p.D_place_stride = D->stride(single ? 0 : 1);
    }
    if (dt_bias) {
        p.bias_head_stride = single ? 0 : dt_bias->stride(0);
        p.bias_place_stride = dt_bias->stride(single ? 0 : 1);
    }
    STD_TORCH_CHECK(batch < (int64_t{1} << 31) - 64 && heads < (int64_t{1} << 31),
                    "shedder_cuda::state_update: B and H must be below 2^31");
    p.batch = static_cast<int>(batch);
    p.heads = static_cast<int>(heads);
    p.headdim = static_cast<int>(headdim);
    p.dstate = static_cast<int>(dstate);
    p.dt_softplus = dt_softplus;
    if (batch * heads * headdim == 0) return;

    const int64_t size = element_size(dtype), state_size = element_size(state.scalar_type());
    const bool tied = p.A_strides.place == 0 && p.A_n_stride == 0 && p.dt_strides.place == 0
        && p.bias_place_stride == 0 && !(p.group_per_place && groups > 1);
    const bool vectors = p.B_n_stride == 1 && p.C_n_stride == 1
        && on_grid(p.B, size, {p.B_batch_stride, p.B_group_stride})
        && on_grid(p.C, size, {p.C_batch_stride, p.C_group_stride})
        && (tied || (p.A_n_stride == 1 && on_grid(p.A, 4, {p.A_strides.head, p.A_strides.place})));
    const bool wide = vectors && dstate % (16 / state_size) == 0 && p.state_n_stride == 1
        && on_grid(p.state, state_size, {p.state_strides.batch, p.state_strides.head, p.state_strides.place});
    const bool channels = heads == 1 && groups == 1 && !tied && dt.scalar_type() == dtype && dstate <= kChannelStates
        && p.state_n_stride == 1 && p.state_strides.place == dstate && batch < (int64_t{1} << 16)
        && on_grid(p.state, state_size, {state.size(0) > 1 ? p.state_strides.batch : 0});
    const bool fours = dstate % 4 == 0 && p.A_n_stride == 1 && on_grid(p.A, 4, {p.A_strides.place});

    arguments.launch(dtype, [&](auto *input, cudaStream_t stream) {
        with_type(kStepOp, state.scalar_type(), [&](auto *kept) {
            using Input = std::remove_pointer_t<decltype(input)>;
            using State = std::remove_pointer_t<decltype(kept)>;
            if (channels) {
                switch (fours ? dstate : 0) {
                    case 4: return launch_channels<Input, State, 4>(p, arguments.device, stream);
                    case 8: return launch_channels<Input, State, 8>(p, arguments.device, stream);
                    case 12: return launch_channels<Input, State, 12>(p, arguments.device, stream);
                    case 16: return launch_channels<Input, State, 16>(p, arguments.device, stream);
                    default: return launch_channels<Input, State, 0>(p, arguments.device, stream);
                }
            }
            if (wide) return launch_step<Input, State, 16 / sizeof(State)>(p, tied, arguments.device, stream);
            launch_step<Input, State, 1>(p, tied, arguments.device, stream);
        });
    });
}

}  // namespace shedder

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cuda, m) {
    m.def("state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
          "Tensor? dt_bias, bool dt_softplus, Tensor? head_to_group, Tensor? state_batch_indices, Tensor(b!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cuda, CUDA, m) {
    m.impl("state_update", TORCH_BOX(&shedder::state_update));
}
