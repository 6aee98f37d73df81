//! Inputs of products with NVFP4 weights, rounded to NVFP4.

use ctxserve_backend::DeviceError;

use super::rms_norm::MOST_COLS;
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "quantise_nvfp4";
const NORM_THREADS: u32 = 384;
const THREADS: u32 = 256;
/// Most factors of one row.
pub const MOST_PARTS: usize = 3;
/// Factors that the kernel takes: quotients by them stay within float32.
pub const FACTORS: std::ops::RangeInclusive<f32> = 1e-30..=1e30;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    weight: u64,
    y: u64,
    live: u64,
    index: u64,
    cols: i32,
    capacity: i32,
    parts: i32,
    scaled: i32,
    eps: f32,
    factors: [f32; MOST_PARTS],
}

// SAFETY: mirrors `Params` of kernels/quantise_nvfp4.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct QuantiseNvfp4 {
    normed: Kernel,
    in_place: Kernel,
}

/// What the rounded value is written as. For a factor `f` it is `code * scale * f`, with an E4M3 scale for each 16 columns of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding<'a> {
    /// Factors, 1 to [`MOST_PARTS`] within [`FACTORS`]: rows rounded by each lie side by side.
    pub factors: &'a [f32],
    /// Whether `code * scale * f`, as bf16 holds it, is written, and not `code * scale`, which bf16 holds exactly.
    pub scaled: bool,
}

/// `round(x * rsqrt(mean(x^2) + eps) * weight)`, one row a block. The value that is rounded is a float32.
#[derive(Debug)]
pub struct NormedCall<'a> {
    /// `[rows, cols]`.
    pub x: &'a Buffer<f32>,
    /// `[cols]`.
    pub weight: &'a Buffer<f32>,
    /// Bits of bf16: panel layout of `[capacity, factors * cols]`, or row-major `[rows, factors * cols]`.
    pub y: &'a Buffer<u16>,
    /// Its first element: rows to do.
    pub live: &'a Buffer<i32>,
    /// Row of `x` for each row of `y`, -1 for a row of zeros; the same row where absent.
    pub index: Option<&'a Buffer<i32>>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Elements of a row, a multiple of 64, at most 9216.
    pub cols: usize,
    /// Rows that panels are laid out for, a multiple of 8; row-major where absent.
    pub capacity: Option<usize>,
    /// Added to the mean square.
    pub eps: f32,
    /// How.
    pub rounding: Rounding<'a>,
}

/// Rounds rows in place.
#[derive(Debug)]
pub struct Call<'a> {
    /// Bits of bf16: panel layout of `[capacity, cols]`, or row-major `[rows, cols]`.
    pub x: &'a Buffer<u16>,
    /// Its first element: rows to do.
    pub live: &'a Buffer<i32>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Elements of a row, a multiple of 64.
    pub cols: usize,
    /// Rows that panels are laid out for, a multiple of 8; row-major where absent.
    pub capacity: Option<usize>,
    /// How; of one factor.
    pub rounding: Rounding<'a>,
}

impl Rounding<'_> {
    /// The arguments, as far as these say; `None` of factors that there is no kernel for.
    fn arguments(&self, cols: usize, capacity: Option<usize>) -> Option<Arguments> {
        let mut factors = [0.0; MOST_PARTS];
        let given = factors.get_mut(..self.factors.len()).filter(|given| !given.is_empty())?;
        given.copy_from_slice(self.factors);
        self.factors.iter().all(|factor| FACTORS.contains(factor)).then_some(Arguments {
            x: 0,
            weight: 0,
            y: 0,
            live: 0,
            index: 0,
            cols: cols as i32,
            capacity: capacity.unwrap_or(0) as i32,
            parts: self.factors.len() as i32,
            scaled: i32::from(self.scaled),
            eps: 0.0,
            factors,
        })
    }
}

impl QuantiseNvfp4 {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let kernel = |function| device.kernel(OP, function, 0);
        Ok(Self { normed: kernel("quantise_nvfp4_normed")?, in_place: kernel("quantise_nvfp4")? })
    }

    /// Issues the norm with what follows it.
    ///
    /// # Errors
    /// Factors beyond what the kernel takes, buffers that are too small, or a device fault.
    pub fn normed(&self, device: &Device, call: &NormedCall<'_>) -> Result<(), DeviceError> {
        let NormedCall { rows, cols, capacity, rounding, .. } = *call;
        let fits = cols.is_multiple_of(64)
            && cols <= MOST_COLS
            && laid_out(rows, capacity)
            && call.weight.len() >= cols
            && call.y.len() >= capacity.unwrap_or(rows) * rounding.factors.len() * cols
            && !call.live.is_empty()
            && call.x.len() >= cols
            && call.index.map_or(call.x.len() >= rows * cols, |index| index.len() >= rows);
        let arguments = rounding.arguments(cols, capacity).filter(|_| fits);
        let arguments = Arguments {
            x: call.x.address(),
            weight: call.weight.address(),
            y: call.y.address(),
            live: call.live.address(),
            index: call.index.map_or(0, Buffer::address),
            eps: call.eps,
            ..arguments.ok_or_else(|| misfit(rows, cols, rounding))?
        };
        let launch = Launch { grid: [rows as u32, 1, 1], block: NORM_THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; `index` holds rows of `x` by the caller's plan.
        unsafe { device.launch(&self.normed, &launch, &arguments) }
    }

    /// Issues the rounding alone.
    ///
    /// # Errors
    /// More than one factor or one beyond what the kernel takes, a buffer that is too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, cols, capacity, rounding, .. } = *call;
        let fits = cols > 0
            && cols.is_multiple_of(64)
            && cols <= 1 << 20
            && (1..1 << 16).contains(&rows)
            && laid_out(rows, capacity)
            && rounding.factors.len() == 1
            && call.x.len() >= capacity.unwrap_or(rows) * cols
            && !call.live.is_empty();
        let arguments = rounding.arguments(cols, capacity).filter(|_| fits);
        let arguments = Arguments {
            y: call.x.address(),
            live: call.live.address(),
            ..arguments.ok_or_else(|| misfit(rows, cols, rounding))?
        };
        // Eight elements a thread: of a panel, or of a row.
        let (chunks, count) = capacity.map_or((cols / 8, rows), |capacity| (capacity * 8, cols / 64));
        let grid = [chunks.div_ceil(THREADS as usize) as u32, count as u32, 1];
        let launch = Launch { grid, block: THREADS, shared: 0, overlap: true };
        // SAFETY: the buffer was checked to be large enough.
        unsafe { device.launch(&self.in_place, &launch, &arguments) }
    }
}

fn laid_out(rows: usize, capacity: Option<usize>) -> bool {
    capacity.is_none_or(|capacity| capacity.is_multiple_of(8) && rows <= capacity && capacity < 1 << 24)
}

fn misfit(rows: usize, cols: usize, rounding: Rounding<'_>) -> DeviceError {
    let factors = rounding.factors;
    DeviceError::new(
        OP,
        format!("{rows} rows of {cols} by factors {factors:?} do not fit the buffers or the kernel"),
    )
}
