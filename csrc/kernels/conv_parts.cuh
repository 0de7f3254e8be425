// Where the channels of a convolution's result lie in its rows.

#pragma once

namespace shedder {

// The first `whole` channels side by side; from column `at` on parts of `part` channels each, whose first ones are
// `pitch` columns apart.
struct ConvParts {
    int whole, part, at, pitch;

    __device__ int column(int channel) const {
        const int behind = channel - whole;
        return behind < 0 ? channel : at + behind / part * pitch + behind % part;
    }
};

}  // namespace shedder
