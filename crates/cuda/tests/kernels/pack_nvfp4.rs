use ctxserve_core::e4m3;
use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::pack_nvfp4::{Call, PackNvfp4, strip_bytes};
use half::bf16;

use crate::common::{Random, device};

/// Values of the sixteen codes.
const CODES: [f64; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// A random matrix in the checkpoint's layout.
pub struct Matrix {
    pub codes: Vec<u8>,
    pub scales: Vec<u8>,
    pub rows: usize,
    pub cols: usize,
}

impl Matrix {
    /// Scale bytes in `low..low + spread`; every 50th is zero or has a sign.
    pub fn random(random: &mut Random, (rows, cols): (usize, usize), (low, spread): (u8, usize)) -> Self {
        let codes = (0..rows * cols / 2).map(|_| random.bits() as u8).collect();
        let scales = (0..rows * cols / 16).map(|_| match random.below(100) {
            0 => 0,
            1 => 0x80 | (low + random.below(spread) as u8),
            _ => low + random.below(spread) as u8,
        });
        Self { codes, scales: scales.collect(), rows, cols }
    }

    /// Element (row, col), without the factor.
    pub fn at(&self, row: usize, col: usize) -> f64 {
        let at = row * self.cols + col;
        let code = self.codes[at / 2] >> (4 * (at % 2)) & 15;
        CODES[code as usize] * f64::from(e4m3(self.scales[at / 16]))
    }

    /// A row times `values`.
    pub fn dot(&self, row: usize, values: &[f64]) -> f64 {
        (0..self.cols).map(|col| self.at(row, col) * values[col]).sum()
    }

    /// The strips of these source rows, -1 for zeros, packed by the kernel `each` rows at a time.
    pub fn pack(&self, device: &Device, map: Option<&[i32]>, each: usize) -> Buffer<u8> {
        let rows = map.map_or(self.rows.next_multiple_of(16), <[i32]>::len);
        let mut strips = device.allocate::<u8>(strip_bytes(rows, self.cols)).unwrap();
        strips.fill(0xff).unwrap();
        let kernel = PackNvfp4::load(device).unwrap();
        for first in (0..rows).step_by(each) {
            let count = each.min(rows - first);
            // Without a map the source is what belongs to these rows.
            let (from, real) = if map.is_some() {
                (0, self.rows)
            } else {
                (first.min(self.rows), self.rows.saturating_sub(first).min(count))
            };
            let row_map = map.map(|map| device.upload(&map[first..][..count]).unwrap());
            let part = |bytes: &[u8], row: usize| device.upload(&bytes[from * row..][..real * row]).unwrap();
            let call = Call {
                codes: &part(&self.codes, self.cols / 2),
                scales: &part(&self.scales, self.cols / 16),
                rows: real,
                cols: self.cols,
                strips: &strips,
                first,
                count,
                row_map: row_map.as_ref(),
            };
            kernel.issue(device, &call).unwrap();
            device.synchronize().unwrap();
        }
        strips
    }
}

const BITS: u32 = 0x81c0_81c0;

/// The four pairs of a word, from kernels/README.md.
fn pairs(w: u32) -> [u32; 4] {
    [w & BITS, (w << 6) & BITS, w.rotate_left(12) & BITS, ((w << 2) ^ (w >> 6)) & BITS]
}

fn value(bits: u32) -> f64 {
    f64::from(bf16::from_bits(bits as u16).to_f32())
}

#[test]
fn every_word_of_bits_is_eight_codes_of_its_own() {
    // The map is linear over bits, so 32 words whose images are independent are enough.
    let image = |w: u32| {
        pairs(w).iter().enumerate().fold(0_u32, |all, (pair, bits)| {
            [6, 7, 8, 15, 22, 23, 24, 31]
                .iter()
                .enumerate()
                .fold(all, |all, (i, from)| all | (bits >> from & 1) << (pair * 8 + i))
        })
    };
    let mut basis: Vec<u32> = Vec::new();
    for bit in 0..32 {
        let mut v = image(1 << bit);
        for &b in &basis {
            v = v.min(v ^ b);
        }
        assert_ne!(v, 0, "bit {bit}");
        basis.push(v);
        basis.sort_unstable_by(|a, b| b.cmp(a));
    }
}

#[test]
fn codes_times_scales_are_exact_in_bf16() {
    for scale in 1..0x7f_u8 {
        // The recoded byte, found from what it must mean.
        let wanted = f64::from(e4m3(scale)) * 2_f64.powi(119);
        let byte = (104..=255_u32).find(|byte| value(byte << 4 | 0x7000) == wanted);
        let byte = byte.unwrap_or_else(|| panic!("no byte for scale {scale}"));
        for code in 0..16_u32 {
            let bits = (code & 8) << 12 | (code & 7) << 6;
            assert_eq!(value(bits) * 2_f64.powi(126), CODES[code as usize]);
            let product = value(bits) * value(byte << 4 | 0x7000);
            assert_eq!(f64::from(bf16::from_f64(product).to_f32()), product);
            assert_eq!(product * 128.0, CODES[code as usize] * f64::from(e4m3(scale)));
        }
    }
}

/// Element (row, col) of strips of `cols` padded columns, as README.md words it: its code and scale as bf16, multiplied.
fn element(strips: &[u8], tiles: usize, row: usize, col: usize) -> f64 {
    let strip = &strips[row / 16 * tiles * 576..][..tiles * 576];
    let (tile, half, inside, upper, g) = (col / 64, col / 32 % 2, col % 32, row % 16 / 8, row % 8);
    let (pair, t, second) = (inside / 8, inside % 8 / 2, inside % 2);
    let at = tile * 512 + (g * 4 + t) * 16 + (half * 2 + upper) * 4;
    let word = u32::from_le_bytes(strip[at..at + 4].try_into().unwrap());
    let code = pairs(word)[pair] >> (16 * second) & 0xffff;
    let scale = strip[tiles * 512 + tile * 64 + g * 8 + half * 4 + upper * 2 + inside / 16];
    value(code) * value(u32::from(scale) << 4 | 0x7000) * 128.0
}

#[test]
fn pack_nvfp4_lays_a_matrix_out_as_described() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, cols, each, mapped) in [
        (16, 64, 16, false),
        (40, 80, 32, false),
        (33, 208, 16, true),
        (256, 2560, 128, false),
        (96, 640, 96, true),
    ] {
        let source = Matrix::random(&mut random, (rows, cols), (0, 0x7f));
        let padded = if mapped { (rows + 20).next_multiple_of(16) } else { rows.next_multiple_of(16) };
        let map: Vec<i32> = (0..padded).map(|_| random.below(rows + 4) as i32 - 2).collect();
        let strips = source.pack(&device, mapped.then_some(&map[..]), each);
        let strips = strips.read(0, strips.len()).unwrap();
        let tiles = cols.div_ceil(64);
        for (row, &from) in map.iter().enumerate() {
            let from = if mapped { from } else { row as i32 };
            for col in 0..tiles * 64 {
                let real = (0..rows as i32).contains(&from) && col < cols;
                let want = if real { source.at(from as usize, col) } else { 0.0 };
                let got = element(&strips, tiles, row, col);
                assert!(got == want, "{rows} x {cols} at {row}, {col}: {got}, want {want}");
            }
        }
    }
}
