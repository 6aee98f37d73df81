// SwiGLU of gpt-oss.
#pragma once
#include "common/common.cuh"

// `gate * sigmoid(alpha * gate) * (up + 1)` of the clamped pair; a NaN stays one.
DEVICE float swiglu(float gate, float up, float alpha, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return __fdividef(gate, 1.0f + __expf(-alpha * gate)) * (up + 1.0f);
}
