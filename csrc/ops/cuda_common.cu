#include "ops/cuda_common.h"

#include <dlfcn.h>

namespace shedder {

cudaStream_t current_stream(int32_t device_index) {
    using Getter = AOTITorchError (*)(int32_t, void **);
    static const Getter getter = [] {
        void *library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void *symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
        STD_TORCH_CHECK(symbol != nullptr, "shedder_cuda: this torch has no CUDA (libtorch_cuda.so is not loaded)");
        return reinterpret_cast<Getter>(symbol);
    }();
    void *stream = nullptr;
    STD_TORCH_CHECK(getter(device_index, &stream) == AOTI_TORCH_SUCCESS,
                    "shedder_cuda: no current stream for device ", device_index);
    return static_cast<cudaStream_t>(stream);
}

void check_launch(const char *op) {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "shedder_cuda::", op, ": ", cudaGetErrorString(error));
}

}  // namespace shedder
