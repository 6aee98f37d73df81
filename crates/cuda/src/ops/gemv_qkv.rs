//! RMSNorm, the fused QKV product, bias and rotary embedding of at most 16 token rows.

use ctxserve_backend::DeviceError;

use super::gemv::{Loaded, Names, Plan, Product, Shape, plan, variants};
use crate::driver::{Buffer, Device, Params};

const OP: &str = "gemv_qkv";
const NAMES: &[Names] = variants!("gemv_qkv": (5, 2, 1), (2, 2, 1), (1, 2, 1));
/// Dimensions of a head in the matrix.
const HEAD: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    product: Product,
    x: u64,
    norm: u64,
    bias: u64,
    positions: u64,
    inv_freq: u64,
    q: u64,
    kv: u64,
    q_width: i32,
    kv_width: i32,
    rope_pairs: i32,
    mean: f32,
    eps: f32,
    mscale: f32,
}

// SAFETY: mirrors `Params` of kernels/gemv_qkv.cu.
unsafe impl Params for Arguments {}

/// What the kernel is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Most token rows, 1 to 16.
    pub rows: usize,
    /// Width of `x`, padded to a multiple of 64; at most 8192.
    pub cols: usize,
    /// 64 times the query heads.
    pub q_width: usize,
    /// 64 times the key heads.
    pub kv_width: usize,
}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct GemvQkv {
    loaded: Loaded,
    dims: Dims,
}

/// `q, k, v = rope(norm(x) W^T + bias)`.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[q_width + 2 * kv_width, cols]`, bits of bf16, rows permuted as kernels/README.md says. It must have
    /// been complete before the launch before this one was issued: it is read without waiting for that.
    pub weights: &'a Buffer<u16>,
    /// `[q_width + 2 * kv_width]`, permuted alike.
    pub bias: &'a Buffer<f32>,
    /// `[cols]`, zero beyond `norm_cols`.
    pub norm: &'a Buffer<f32>,
    /// `[rows, cols]`, zero beyond `norm_cols`.
    pub x: &'a Buffer<f32>,
    /// One integer: rows to do; later rows of the outputs are left alone.
    pub live: &'a Buffer<i32>,
    /// `[rows]`.
    pub positions: &'a Buffer<i32>,
    /// One frequency a pair; at most 32.
    pub inv_freq: &'a Buffer<f32>,
    /// `[rows, q_width]`, bits of bf16, heads in natural order.
    pub q: &'a Buffer<u16>,
    /// `[rows, 2 * kv_width]`: keys, rotated, in natural order, then values.
    pub kv: &'a Buffer<f32>,
    /// Elements that the mean square is over.
    pub norm_cols: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Factor of cosine and sine.
    pub mscale: f32,
}

impl GemvQkv {
    /// Loads the kernel for a shape.
    ///
    /// # Errors
    /// A shape that it does not take, or no code for this device.
    pub fn load(device: &Device, dims: Dims) -> Result<Self, DeviceError> {
        Self::with_plan(device, dims, plan(OP, &shape(dims)?, device.facts(), NAMES)?)
    }

    /// Loads it with a plan other than its own.
    ///
    /// # Errors
    /// As [`GemvQkv::load`]; a plan without a kernel.
    pub fn with_plan(device: &Device, dims: Dims, plan: Plan) -> Result<Self, DeviceError> {
        Ok(Self { loaded: Loaded::new(device, OP, NAMES, shape(dims)?, plan)?, dims })
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
        let Dims { rows, cols, q_width, kv_width } = self.dims;
        let outputs = q_width + 2 * kv_width;
        let fits = call.weights.len() >= outputs * cols
            && call.bias.len() >= outputs
            && call.norm.len() >= cols
            && call.x.len() >= rows * cols
            && !call.live.is_empty()
            && call.positions.len() >= rows
            && call.inv_freq.len() <= HEAD / 2
            && call.q.len() >= rows * q_width
            && call.kv.len() >= rows * 2 * kv_width
            && (1..=cols).contains(&call.norm_cols);
        if !fits {
            return Err(DeviceError::new(OP, format!("{:?} does not fit its buffers", self.dims)));
        }
        for (launch, product) in self.loaded.launches(call.weights.address(), call.live.address()) {
            let arguments = Arguments {
                product,
                x: call.x.address(),
                norm: call.norm.address(),
                bias: call.bias.address(),
                positions: call.positions.address(),
                inv_freq: call.inv_freq.address(),
                q: call.q.address(),
                kv: call.kv.address(),
                q_width: q_width as i32,
                kv_width: kv_width as i32,
                rope_pairs: call.inv_freq.len() as i32,
                mean: 1.0 / call.norm_cols as f32,
                eps: call.eps,
                mscale: call.mscale,
            };
            // SAFETY: every buffer was checked to be large enough for the shape that the kernel was loaded for.
            unsafe { device.launch(self.loaded.kernel(), &launch, &arguments) }?;
        }
        Ok(())
    }
}

fn shape(dims: Dims) -> Result<Shape, DeviceError> {
    let Dims { rows, cols, q_width, kv_width } = dims;
    if !q_width.is_multiple_of(HEAD) || !kv_width.is_multiple_of(HEAD) {
        return Err(DeviceError::new(OP, format!("{q_width} and {kv_width} are not whole heads of {HEAD}")));
    }
    Ok(Shape { rows, cols, outputs: q_width + 2 * kv_width, normed: true, walks: false })
}
