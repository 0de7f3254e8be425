// B and C of all states of a step side by side: word (b, t, n) = (B, C) of state n, the low half B. So that those who
// walk along t from any step on read whole pieces of 16 bytes, whatever the strides of B and C are.

#pragma once

#include "kernels/dependents.cuh"
#include "kernels/selective_scan_fwd.cuh"

namespace shedder {

constexpr int kScanWordThreads = 128;

// Words of a step, zeros for states not there.
constexpr __host__ __device__ int scan_word_pitch(int states) { return states <= 4 ? 4 : states <= 8 ? 8 : 16; }

// Steps of zeros before and behind those of a batch entry.
constexpr int kScanWordsBefore = 16, kScanWordsBehind = 64;
constexpr __host__ __device__ int64_t scan_word_row(int length, int64_t b) {            // of step 0
    return b * (kScanWordsBefore + int64_t{length} + kScanWordsBehind) + kScanWordsBefore;
}

// Four states of a step a thread. Input: of 16 bits.
template <typename Input>
__global__ void __launch_bounds__(kScanWordThreads) selective_scan_state_words(const SelectiveScanParams p, int pitch,
                                                                                uint4 *words) {
    start_dependents();                                      // the scan's CTAs, which fill a multiprocessor each
    wait_for_kernel_before();
    const int t = blockIdx.x * kScanWordThreads + threadIdx.x - kScanWordsBefore, first_state = blockIdx.y * 4;
    const int64_t b = blockIdx.z;
    if (t >= p.length + kScanWordsBehind) return;
    const auto half = [&](const void *tensor, const Strides4 &s, int n) -> uint32_t {
        const bool exists = 0 <= t && t < p.length && n < p.dstate;
        return exists ? static_cast<const uint16_t *>(tensor)[b * s.batch + n * s.state + t * s.time] : 0;
    };
    uint32_t word[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
        word[k] = half(p.B, p.B_strides, first_state + k) | half(p.C, p.C_strides, first_state + k) << 16;
    words[((scan_word_row(p.length, b) + t) * pitch + first_state) / 4] =
        make_uint4(word[0], word[1], word[2], word[3]);
}

}  // namespace shedder
