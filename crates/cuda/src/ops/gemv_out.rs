//! The output projection of at most 16 token rows, added to the residual stream.

use ctxserve_backend::DeviceError;

use super::gemv::{Loaded, Names, Plan, Product, Shape, plan, variants};
use crate::driver::{Buffer, Device, Params};

const OP: &str = "gemv_out";
const NAMES: &[Names] = variants!("gemv_out": (3, 4, 4), (3, 2, 2), (1, 2, 2));

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    product: Product,
    heads: u64,
    bias: u64,
    x: u64,
}

// SAFETY: mirrors `Params` of kernels/gemv_out.cu.
unsafe impl Params for Arguments {}

/// What the kernel is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Most token rows, 1 to 16.
    pub rows: usize,
    /// 64 times the query heads; at most 8192.
    pub q_width: usize,
    /// Width of `x`, a multiple of 8.
    pub hidden: usize,
}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct GemvOut {
    loaded: Loaded,
    dims: Dims,
}

/// `x += heads W^T + bias`.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[hidden, q_width]`, bits of bf16. It must have been complete before the launch before this one was
    /// issued: it is read without waiting for that.
    pub weights: &'a Buffer<u16>,
    /// `[hidden]`.
    pub bias: &'a Buffer<f32>,
    /// `[rows, q_width]`, bits of bf16.
    pub heads: &'a Buffer<u16>,
    /// `[rows, hidden]`.
    pub x: &'a Buffer<f32>,
    /// One integer: rows to do; later rows of `x` are left alone.
    pub live: &'a Buffer<i32>,
}

impl GemvOut {
    /// Loads the kernel for a shape.
    ///
    /// # Errors
    /// A shape that it does not take, or no code for this device.
    pub fn load(device: &Device, dims: Dims) -> Result<Self, DeviceError> {
        Self::with_plan(device, dims, plan(OP, &shape(dims), device.facts(), NAMES)?)
    }

    /// Loads it with a plan other than its own.
    ///
    /// # Errors
    /// As [`GemvOut::load`]; a plan without a kernel.
    pub fn with_plan(device: &Device, dims: Dims, plan: Plan) -> Result<Self, DeviceError> {
        Ok(Self { loaded: Loaded::new(device, OP, NAMES, shape(dims), plan)?, dims })
    }

    /// How it is launched.
    pub fn plan(&self) -> &Plan {
        &self.loaded.plan
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Dims { rows, q_width, hidden } = self.dims;
        let fits = call.weights.len() >= hidden * q_width
            && call.bias.len() >= hidden
            && call.heads.len() >= rows * q_width
            && call.x.len() >= rows * hidden
            && !call.live.is_empty();
        if !fits {
            return Err(DeviceError::new(OP, format!("{:?} does not fit its buffers", self.dims)));
        }
        for (launch, product) in self.loaded.launches(call.weights.address(), call.live.address()) {
            let (heads, bias, x) = (call.heads.address(), call.bias.address(), call.x.address());
            let arguments = Arguments { product, heads, bias, x };
            // SAFETY: every buffer was checked to be large enough for the shape that the kernel was loaded for.
            unsafe { device.launch(self.loaded.kernel(), &launch, &arguments) }?;
        }
        Ok(())
    }
}

fn shape(dims: Dims) -> Shape {
    Shape { rows: dims.rows, cols: dims.q_width, outputs: dims.hidden, normed: false, walks: false }
}
