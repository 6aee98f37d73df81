//! Experts from the checkpoint's layout to MXFP4 strips, at load.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "pack_mxfp4";
const THREADS: u32 = 256;
const TILE_BYTES: usize = 512 + 32;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    codes: u64,
    scales: u64,
    strips: u64,
    experts: i32,
    rows: i32,
    cols: i32,
    count: i32,
    tiles: i32,
    gate_up: i32,
}

// SAFETY: mirrors `Params` of kernels/pack_mxfp4.cu.
unsafe impl Params for Arguments {}

/// What the rows of an expert are, which says how strips take them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Row `2i` is gate `i`, row `2i + 1` is up `i`.
    GateUp,
    /// Rows in order.
    Down,
}

/// The strips of one expert's matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strips {
    /// Strips of 16 rows.
    pub count: usize,
    /// Tiles of 64 columns of a strip.
    pub tiles: usize,
}

impl Strips {
    /// Of a matrix `[rows, cols]`, padded: columns to a multiple of 64; rows to one of 16, or, of gate and up, each to a multiple
    /// of 64, because their outputs are the columns of the next product.
    pub fn of(kind: Rows, rows: usize, cols: usize) -> Self {
        let count = match kind {
            Rows::GateUp => (rows / 2).next_multiple_of(64) / 8,
            Rows::Down => rows.div_ceil(16),
        };
        Self { count, tiles: cols.div_ceil(64) }
    }

    /// Bytes of an expert.
    pub fn bytes(self) -> usize {
        self.count * self.tiles * TILE_BYTES
    }
}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct PackMxfp4 {
    kernel: Kernel,
}

/// Packs some experts.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[experts * rows, cols / 2]`: two codes a byte, the even column in the low half.
    pub codes: &'a Buffer<u8>,
    /// `[experts * rows, cols / 32]`: E8M0 bytes.
    pub scales: &'a Buffer<u8>,
    /// Strips of all experts, expert after expert ([`Strips::bytes`] each).
    pub strips: &'a Buffer<u8>,
    /// The place in `strips` of the first expert packed.
    pub first: usize,
    /// How many are packed.
    pub experts: usize,
    /// Rows of an expert, even for gate/up.
    pub rows: usize,
    /// Columns, a multiple of 32.
    pub cols: usize,
    /// What the rows are.
    pub kind: Rows,
}

impl PackMxfp4 {
    /// Loads the kernel.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { kernel: device.kernel("pack_mxfp4", "pack_mxfp4", 0)? })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { first, experts, rows, cols, kind, .. } = *call;
        let strips = Strips::of(kind, rows, cols);
        let wrong = || {
            DeviceError::new(
                OP,
                format!("{experts} experts of {rows} x {cols} from {first} do not fit the buffers"),
            )
        };
        let elements =
            experts.checked_mul(rows).and_then(|count| count.checked_mul(cols)).ok_or_else(wrong)?;
        let end = first
            .checked_add(experts)
            .and_then(|count| count.checked_mul(strips.bytes()))
            .ok_or_else(wrong)?;
        let blocks = (experts * strips.count * strips.tiles).div_ceil(THREADS as usize / 32);
        let fits = cols.is_multiple_of(32)
            && (kind == Rows::Down || rows.is_multiple_of(2))
            && call.codes.len() >= elements / 2
            && call.scales.len() >= elements / 32
            && call.strips.len() >= end
            && blocks <= i32::MAX as usize;
        if !fits {
            return Err(wrong());
        }
        if blocks == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            codes: call.codes.address(),
            scales: call.scales.address(),
            strips: call.strips.at(OP, first * strips.bytes())?,
            experts: experts as i32,
            rows: rows as i32,
            cols: cols as i32,
            count: strips.count as i32,
            tiles: strips.tiles as i32,
            gate_up: i32::from(kind == Rows::GateUp),
        };
        let launch = Launch { grid: [blocks as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strips_are_padded_to_whole_tiles() {
        assert_eq!(Strips::of(Rows::GateUp, 5760, 2880), Strips { count: 360, tiles: 45 });
        assert_eq!(Strips::of(Rows::Down, 2880, 2880), Strips { count: 180, tiles: 45 });
        assert_eq!(Strips::of(Rows::Down, 2880, 2880).bytes(), 180 * 45 * 544);
        // 48 gates and ups become the 64 columns that the down product reads.
        assert_eq!(Strips::of(Rows::GateUp, 96, 32), Strips { count: 8, tiles: 1 });
        assert_eq!(Strips::of(Rows::Down, 40, 96), Strips { count: 3, tiles: 2 });
    }
}
