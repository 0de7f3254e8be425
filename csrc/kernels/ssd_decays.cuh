// What each token of a chunk contributes to y and to the state, found by one warp of ssd_fwd for one head.

#pragma once

#include <cstdint>

#include "kernels/ssd_pieces.cuh"
#include "kernels/ssd_rows.cuh"
#include "kernels/ssd_wgmma.cuh"

namespace shedder {

// log(1 + exp(x)), with the small values of very negative x: there the first terms of the series.
__device__ __forceinline__ float ssd_softplus(float x) {
    const float e = exp2_fast(x * 1.4426950408889634f);
    const float series = e * (1.f - e * (1.f / 2 - e * (1.f / 3 - e * (1.f / 4 - e * (1.f / 5)))));
    const float log = 0.6931471805599453f * log2_fast(1.f + e);
    return x > 20.f ? x : e < 0.0625f ? series : log;
}

struct SsdDecays {
    float s[kChunk];
    float columns[kChunk];                                   // s - log2(dt)
    float anchored[kChunk];                                  // dt 2^(s[e] - s), e the last token of the 16 it is among
    float from_state[kChunk];                                // 2^s
    float to_state[kChunk];                                  // dt 2^(s[63] - s)
    int run[kChunk];                                         // twice the run, plus one if y is shown
    float keep;                                              // 2^s[63]
    float unused[3];
};

// Where the producer finds dt of one head.
struct SsdSource {
    float A, bias;                                           // A times log2(e)
    const char *dt;                                          // of the first token
    const int32_t *runs;                                     // of the first token; may be null
};

__device__ __forceinline__ SsdSource source_of(const SsdParams &p, int batch, int head) {
    SsdSource source;
    source.A = p.A[head * p.A_stride] * 1.4426950408889634f;
    source.bias = p.dt_bias == nullptr ? 0.f : p.dt_bias[head * p.dt_bias_stride];
    source.dt = static_cast<const char *>(p.dt)
        + (batch * p.dt_strides.batch + head * p.dt_strides.head) * (p.dt_float ? 4 : 2);
    source.runs = p.runs == nullptr ? nullptr : p.runs + batch * int64_t{p.length};
    return source;
}

// dt of two neighbouring tokens in each lane, as it lies in memory: nobody waits for it before it is used.
__device__ __forceinline__ uint2 fetch_dt(const SsdParams &p, const SsdSource &source, int chunk, int lane) {
    uint32_t raw[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t at = min(chunk * kChunk + 2 * lane + i, p.length - 1) * p.dt_strides.time;
        if (p.dt_float) raw[i] = reinterpret_cast<const uint32_t *>(source.dt)[at];
        else raw[i] = reinterpret_cast<const uint16_t *>(source.dt)[at];
    }
    return {raw[0], raw[1]};
}

// The steps of two neighbouring tokens in each lane.
struct SsdSteps {
    float dt[2], s[2];                                       // dt as it counts: 0 where nothing is shown
    int run[2], run_in;                                      // their runs; the run that the state before belongs to
    bool shown[2];
};

// The steps of a chunk, by one warp.
template <typename Input, bool kHasRuns>
__device__ __forceinline__ SsdSteps steps_of(const SsdParams &p, const SsdSource &source, int chunk, int lane,
                                             uint2 raw) {
    const auto given = [&](uint32_t raw) { return p.dt_float ? __uint_as_float(raw) : unpack<Input>(raw).x; };
    SsdSteps steps{{given(raw.x), given(raw.y)}, {}, {}, 0, {}};
    float decay[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float &dt = steps.dt[i];
        int &run = steps.run[i];
        const int t = chunk * kChunk + 2 * lane + i;
        steps.shown[i] = t < p.length;
        dt += source.bias;
        if (p.dt_softplus) dt = ssd_softplus(dt);
        dt = dt < p.dt_min ? p.dt_min : dt;                  // comparisons, so that NaN stays NaN
        dt = dt > p.dt_max ? p.dt_max : dt;
        if (kHasRuns && p.runs != nullptr) {
            run = source.runs[min(t, p.length - 1)];
            steps.shown[i] = steps.shown[i] && run >= 0;
            run = run < 0 ? ~run : run;
        }
        dt = steps.shown[i] ? dt : 0.f;
        decay[i] = dt * source.A;
        decay[i] = decay[i] < -160.f ? -160.f : decay[i];    // is 0 all the same, and s keeps its digits
    }
    float sum = decay[0] + decay[1];
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    steps.s[0] = sum - decay[1];
    steps.s[1] = sum;
    if (kHasRuns && p.runs != nullptr && chunk > 0) steps.run_in = source.runs[chunk * kChunk - 1];
    steps.run_in = steps.run_in < 0 ? ~steps.run_in : steps.run_in;
    return steps;
}

// What these come to, to shared memory, by the same warp.
__device__ __forceinline__ void write_decays(const SsdSteps &steps, int lane, SsdDecays &to) {
    const auto &[dt, s, run, run_in, shown] = steps;
    const float anchor = __shfl_sync(0xffffffffu, s[1], lane | 7), total = __shfl_sync(0xffffffffu, s[1], 31);
    const int run_out = __shfl_sync(0xffffffffu, run[1], 31);
    float from_state[2], to_state[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        from_state[i] = run[i] == run_in ? exp2_fast(s[i]) : 0.f;
        to_state[i] = run[i] == run_out ? exp2_fast(total - s[i]) * dt[i] : 0.f;
    }
    reinterpret_cast<float2 *>(to.s)[lane] = {s[0], s[1]};
    reinterpret_cast<float2 *>(to.columns)[lane] = {s[0] - log2_fast(dt[0]), s[1] - log2_fast(dt[1])};
    reinterpret_cast<float2 *>(to.anchored)[lane] = {exp2_fast(anchor - s[0]) * dt[0],
                                                     exp2_fast(anchor - s[1]) * dt[1]};
    reinterpret_cast<float2 *>(to.from_state)[lane] = {from_state[0], from_state[1]};
    reinterpret_cast<float2 *>(to.to_state)[lane] = {to_state[0], to_state[1]};
    reinterpret_cast<int2 *>(to.run)[lane] = {2 * run[0] + shown[0], 2 * run[1] + shown[1]};
    if (lane == 0) to.keep = run_in == run_out ? exp2_fast(total) : 0.f;
}

}  // namespace shedder
