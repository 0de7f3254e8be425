// Launcher of the matrix-vector product of a decode step: checks, brings x into floats, splits the outputs over threads.

#include <cstring>

#include "ops/cpu_common.h"

namespace shedder::cpu {
namespace {

constexpr const char *kOp = "linear";

void linear(const Tensor &x, const Tensor &weight, const MaybeTensor &bias, Tensor y) {
    STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "shedder_cpu::linear takes x (M, I) and weight (O, I)");
    const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
    STD_TORCH_CHECK(rows <= kMaxLinearRows, "shedder_cpu::linear: x has ", rows, " rows; accepted: up to ", kMaxLinearRows);
    Linear p;
    p.x = array(kOp, "x", x, {rows, inputs});
    p.weight = array(kOp, "weight", weight, {outputs, inputs});
    p.bias = array(kOp, "bias", bias, {outputs});
    p.y = array(kOp, "y", y, {rows, outputs});
    p.rows = rows;
    p.inputs = inputs;
    STD_TORCH_CHECK(inputs <= 1 || (p.weight.stride[1] == 1 && p.x.stride[1] == 1),
                    "shedder_cpu::linear: the last dimension of x and weight must be contiguous");
    STD_TORCH_CHECK(p.x.dtype != Dtype::f16, "shedder_cpu::linear: x is fp16; accepted: fp32 or bf16");
    const bool as_bf16 = p.x.dtype == Dtype::bf16 && p.weight.dtype == Dtype::bf16 &&
                         !std::strcmp(kernels().isa, "v4bf16");
    std::vector<float> floats;
    if (p.x.dtype == Dtype::bf16 && !as_bf16) {
        floats.resize(rows * inputs);
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t i = 0; i < inputs; ++i) {
                const uint32_t bits =
                    static_cast<uint32_t>(static_cast<const uint16_t *>(p.x.data)[m * p.x.stride[0] + i]) << 16;
                std::memcpy(&floats[m * inputs + i], &bits, sizeof bits);
            }
        p.x = Array{floats.data(), Dtype::f32, {inputs, 1, 0, 0}};
    }
    split(outputs, inputs * rows / 2, [&p](int64_t begin, int64_t end) { kernels().linear(p, begin, end); });
}

}  // namespace
}  // namespace shedder::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(shedder_cpu, m) {
    m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shedder_cpu, CPU, m) { m.impl("linear", TORCH_BOX(&shedder::cpu::linear)); }
