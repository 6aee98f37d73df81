//! Dense NVFP4 weights from the checkpoint's layout to strips, at load.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "pack_nvfp4";
const THREADS: u32 = 256;
/// Rows of a strip.
pub const STRIP_ROWS: usize = 16;
/// Columns of a tile.
const TILE_COLS: usize = 64;
const TILE_BYTES: usize = 512 + 64;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    codes: u64,
    scales: u64,
    row_map: u64,
    strips: u64,
    rows: i32,
    cols: i32,
    count: i32,
    tiles: i32,
}

// SAFETY: mirrors `Params` of kernels/pack_nvfp4.cu.
unsafe impl Params for Arguments {}

/// Bytes of the strips of a matrix, rows padded to whole strips and columns to whole tiles.
pub fn strip_bytes(rows: usize, cols: usize) -> usize {
    rows.div_ceil(STRIP_ROWS) * cols.div_ceil(TILE_COLS) * TILE_BYTES
}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct PackNvfp4 {
    kernel: Kernel,
}

/// Packs rows `first .. first + count` of the strips.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, cols / 2]`: two codes a byte, the even column in the low half.
    pub codes: &'a Buffer<u8>,
    /// `[rows, cols / 16]`: e4m3.
    pub scales: &'a Buffer<u8>,
    /// Rows of the source, as much of it as `codes` and `scales` hold.
    pub rows: usize,
    /// Its columns, a multiple of 16.
    pub cols: usize,
    /// Strips of the whole matrix ([`strip_bytes`]).
    pub strips: &'a Buffer<u8>,
    /// First row to write, a multiple of 16.
    pub first: usize,
    /// Rows to write, a multiple of 16.
    pub count: usize,
    /// `[count]`: the source row of each, -1 for zeros. Absent: in order from row 0 of the source on, zeros beyond it.
    pub row_map: Option<&'a Buffer<i32>>,
}

impl PackNvfp4 {
    /// Loads the kernel.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { kernel: device.kernel(OP, OP, 0)? })
    }

    /// Issues it. Kernels that read weights before they wait must not be issued before this one has finished:
    /// [`Device::synchronize`] once after loading.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, cols, first, count, .. } = *call;
        let small = |value: usize| value <= 1 << 28;
        let fits = [rows, cols, first, count].into_iter().all(small)
            && cols.is_multiple_of(16)
            && first.is_multiple_of(STRIP_ROWS)
            && count.is_multiple_of(STRIP_ROWS)
            && call.codes.len() >= rows * cols / 2
            && call.scales.len() >= rows * cols / 16
            && call.strips.len() >= strip_bytes(first + count, cols)
            && call.row_map.is_none_or(|map| map.len() >= count);
        let tiles = cols.div_ceil(TILE_COLS);
        let blocks = (count / STRIP_ROWS * tiles).div_ceil(THREADS as usize / 32);
        if !fits || blocks > i32::MAX as usize {
            return Err(DeviceError::new(
                OP,
                format!("[{rows}, {cols}] to rows {first}..+{count} of strips does not fit its buffers"),
            ));
        }
        if blocks == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            codes: call.codes.address(),
            scales: call.scales.address(),
            row_map: call.row_map.map_or(0, Buffer::address),
            strips: call.strips.at(OP, strip_bytes(first, cols))?,
            rows: rows as i32,
            cols: cols as i32,
            count: count as i32,
            tiles: tiles as i32,
        };
        let launch = Launch { grid: [blocks as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; source rows are checked by the kernel.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_are_padded_to_whole_tiles() {
        assert_eq!(strip_bytes(6144, 2560), 6144 / 16 * 40 * 576);
        assert_eq!(strip_bytes(17, 80), 2 * 2 * 576);
        assert_eq!(strip_bytes(0, 64), 0);
    }
}
