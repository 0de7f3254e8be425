// One decode step of either family.
//
//   dt = clamp(softplus(dt + bias), dt_min, dt_max)      h = exp(dt A) h + dt B x      y = (sum_n C h + D x) silu(z)
//
// With N = 0, a removed SSM, y = D x silu(z) is left: no state, dt, A, B or C.
//
// Lanes are states of one row (h, p): the state is read and written once, in its own dtype. Where A does not change
// over the states its exponentials are taken for kRows rows at once. Bound: bytes of the state.

#include "simd.h"

namespace shedder::cpu::SHEDDER_ISA {
namespace {

constexpr int kRows = 64;

// h = exp2(scale A) h + input B in place; returns sum C h. A null: the decay is `scale` itself.
template <typename State>
float step_row(typename State::type *h, const float *A, float scale, float input, const float *B, const float *C,
               int64_t states) {
    const Vec a = splat(scale), in = splat(input);
    Vec sum0 = splat(0), sum1 = splat(0);
    auto next = [&](Vec old, Vec rate, Vec b) { return (A ? exp2(a * rate) : a) * old + in * b; };
    int64_t n = 0;
    for (; n + 2 * kLanes <= states; n += 2 * kLanes) {
        const Vec h0 = next(State::load(h + n), A ? load(A + n) : a, load(B + n));
        const Vec h1 = next(State::load(h + n + kLanes), A ? load(A + n + kLanes) : a, load(B + n + kLanes));
        sum0 += h0 * load(C + n);
        sum1 += h1 * load(C + n + kLanes);
        State::store(h + n, h0);
        State::store(h + n + kLanes, h1);
    }
    if (n + kLanes <= states) {
        const Vec h0 = next(State::load(h + n), A ? load(A + n) : a, load(B + n));
        sum0 += h0 * load(C + n);
        State::store(h + n, h0);
        n += kLanes;
    }
    if (n < states) {                                              // lanes beyond N read zeros everywhere
        const int64_t some = states - n;
        const Vec rate = A ? load_some<Float>(A + n, some) : a;
        const Vec h0 = next(load_some<State>(h + n, some), rate, load_some<Float>(B + n, some));
        sum1 += h0 * load_some<Float>(C + n, some);
        store_some<State>(h + n, h0, some);
    }
    return sum(sum0 + sum1);
}

// Floats of row [0, n) of an array: itself if it can be used in place, else a copy in `buffer`.
const float *in_place(const Array &a, int64_t offset, int64_t stride, int64_t n, float *buffer) {
    if (a.dtype == Dtype::f32 && (stride == 1 || n == 1)) return static_cast<const float *>(a.data) + offset;
    read_row(a, offset, stride, n, buffer);
    return buffer;
}

// Rows [first, first + count) of one (batch, head); count <= kRows.
struct Rows {
    int64_t batch, head, first, count;

    void read(const Array &a, float *out) const {                 // (H, P)
        read_row(a, head * a.stride[0] + first * a.stride[1], a.stride[1], count, out);
    }
    void read_batched(const Array &a, float *out) const {         // (B, H, P)
        read_row(a, batch * a.stride[0] + head * a.stride[1] + first * a.stride[2], a.stride[2], count, out);
    }
};

// The states of `slot` move on; y = sum_n C h. x and y have kRows floats.
void step_states(const StateUpdate &p, const Rows &rows, int64_t slot, const float *x, float *y) {
    const auto [batch, head, first, count] = rows;
    float dt[kRows] = {}, decay[kRows] = {}, bias[kRows] = {};
    float copy_A[kMaxStates], copy_B[kMaxStates], copy_C[kMaxStates], row[kMaxStates];
    rows.read_batched(p.dt, dt);
    if (p.dt_bias) rows.read(p.dt_bias, bias);
    const bool scalar_A = p.A.stride[2] == 0;
    if (scalar_A) rows.read(p.A, decay);
    for (int64_t i = 0; i < count; i += kLanes) {
        Vec d = load(dt + i) + load(bias + i);
        if (p.dt_softplus) d = softplus(d);
        d = maximum(splat(p.dt_min), minimum(splat(p.dt_max), d));
        store(dt + i, d);
        if (scalar_A) store(decay + i, exp(d * load(decay + i)));
    }

    const float *B = nullptr, *C = nullptr;
    int64_t group = -1;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t wanted = !p.head_to_group ? 0 : p.head_to_group[p.heads == 1 ? first + i : head];
        if (wanted != group) {
            group = wanted;
            B = in_place(p.B, batch * p.B.stride[0] + group * p.B.stride[1], p.B.stride[2], p.states, copy_B);
            C = in_place(p.C, batch * p.C.stride[0] + group * p.C.stride[1], p.C.stride[2], p.states, copy_C);
        }
        const float *A = nullptr;
        float scale = decay[i];
        if (!scalar_A) {
            A = in_place(p.A, head * p.A.stride[0] + (first + i) * p.A.stride[1], p.A.stride[2], p.states, copy_A);
            scale = dt[i] * 1.44269504088896341f;                 // exp(x) = exp2(x log2 e)
        }
        const float input = dt[i] * x[i];
        const int64_t offset = slot * p.state.stride[0] + head * p.state.stride[1] + (first + i) * p.state.stride[2];
        if (p.state.stride[3] != 1) {
            read_row(p.state, offset, p.state.stride[3], p.states, row);
            y[i] = step_row<Float>(row, A, scale, input, B, C, p.states);
            write_row(p.state, offset, p.state.stride[3], p.states, row);
            continue;
        }
        float *as_float = static_cast<float *>(p.state.data) + offset;
        uint16_t *as_half = static_cast<uint16_t *>(p.state.data) + offset;
        switch (p.state.dtype) {
            case Dtype::f32: y[i] = step_row<Float>(as_float, A, scale, input, B, C, p.states); break;
            case Dtype::bf16: y[i] = step_row<BFloat16>(as_half, A, scale, input, B, C, p.states); break;
            case Dtype::f16: y[i] = step_row<Float16>(as_half, A, scale, input, B, C, p.states); break;
        }
    }
}

void step_rows(const StateUpdate &p, const Rows &rows) {
    const auto [batch, head, first, count] = rows;
    float x[kRows] = {}, y[kRows] = {}, other[kRows] = {};
    const int64_t y_offset = batch * p.y.stride[0] + head * p.y.stride[1] + first * p.y.stride[2];
    const int64_t slot = p.state_batch_indices ? p.state_batch_indices[batch] : batch;
    if (slot < 0) return write_row(p.y, y_offset, p.y.stride[2], count, y);

    rows.read_batched(p.x, x);
    if (p.states) step_states(p, rows, slot, x, y);
    if (p.D) {
        rows.read(p.D, other);
        for (int64_t i = 0; i < count; i += kLanes) store(y + i, load(y + i) + load(other + i) * load(x + i));
    }
    if (p.z) {
        rows.read_batched(p.z, other);
        for (int64_t i = 0; i < count; i += kLanes) store(y + i, load(y + i) * silu(load(other + i)));
    }
    write_row(p.y, y_offset, p.y.stride[2], count, y);
}

}  // namespace

void state_update(const StateUpdate &p, int64_t begin, int64_t end) {
    while (begin < end) {
        const int64_t first = begin % p.headdim, head = begin / p.headdim % p.heads;
        int64_t count = p.headdim - first;
        if (count > end - begin) count = end - begin;
        if (count > kRows) count = kRows;
        step_rows(p, {begin / (p.headdim * p.heads), head, first, count});
        begin += count;
    }
}

}  // namespace shedder::cpu::SHEDDER_ISA
