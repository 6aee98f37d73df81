use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::pack_mxfp4::{Call, PackMxfp4, Rows, Strips};
use half::f16;

use crate::common::{Random, device};

/// Values of the sixteen codes.
const CODES: [f64; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Random experts in the checkpoint's layout.
pub struct Experts {
    pub codes: Vec<u8>,
    pub scales: Vec<u8>,
    pub experts: usize,
    pub rows: usize,
    pub cols: usize,
}

impl Experts {
    /// Scale bytes in `low..low + spread`.
    pub fn random(
        random: &mut Random,
        experts: usize,
        (rows, cols): (usize, usize),
        (low, spread): (u8, usize),
    ) -> Self {
        let mut codes = vec![0; experts * rows * cols / 2];
        for chunk in codes.chunks_mut(8) {
            chunk.copy_from_slice(&random.bits().to_le_bytes()[..chunk.len()]);
        }
        let scales = (0..experts * rows * cols / 32).map(|_| low + random.below(spread) as u8).collect();
        Self { codes, scales, experts, rows, cols }
    }

    /// Element (row, col) of an expert.
    pub fn at(&self, expert: usize, row: usize, col: usize) -> f64 {
        let at = (expert * self.rows + row) * self.cols + col;
        let code = self.codes[at / 2] >> (4 * (at % 2)) & 15;
        CODES[code as usize] * 2_f64.powi(i32::from(self.scales[at / 32]) - 127)
    }

    /// A row of an expert times `values`.
    pub fn dot(&self, expert: usize, row: usize, values: &[f64]) -> f64 {
        (0..self.cols).map(|col| self.at(expert, row, col) * values[col]).sum()
    }

    /// Packed by the kernel, one expert a launch.
    pub fn pack(&self, device: &Device, kind: Rows) -> Buffer<u8> {
        let strips = Strips::of(kind, self.rows, self.cols);
        let mut packed = device.allocate::<u8>(self.experts * strips.bytes()).unwrap();
        packed.fill(0xff).unwrap();
        let kernel = PackMxfp4::load(device).unwrap();
        for expert in 0..self.experts {
            let (codes, scales) = (self.rows * self.cols / 2, self.rows * self.cols / 32);
            let call = Call {
                codes: &device.upload(&self.codes[expert * codes..][..codes]).unwrap(),
                scales: &device.upload(&self.scales[expert * scales..][..scales]).unwrap(),
                strips: &packed,
                first: expert,
                experts: 1,
                rows: self.rows,
                cols: self.cols,
                kind,
            };
            kernel.issue(device, &call).unwrap();
        }
        packed
    }
}

/// The bits of code `code` as member `pair` of a word, from kernels/README.md.
fn place(code: u8, pair: usize) -> u32 {
    let (sign, rest) = (u32::from(code >> 3), u32::from(code & 7));
    let (at, shift) = [(15, 9), (12, 6), (14, 3), (13, 0)][pair];
    sign << at | rest << shift
}

/// The layout as README.md words it, element by element.
fn reference(experts: &Experts, kind: Rows) -> Vec<u8> {
    let strips = Strips::of(kind, experts.rows, experts.cols);
    let mut bytes = vec![0; experts.experts * strips.bytes()];
    let each = strips.tiles * 544;
    for expert in 0..experts.experts {
        for strip in 0..strips.count {
            let out = &mut bytes[(expert * strips.count + strip) * each..][..each];
            for (g, upper) in (0..8).flat_map(|g| [(g, 0), (g, 1)]) {
                let row = match kind {
                    Rows::GateUp => (strip * 8 + g) * 2 + upper,
                    Rows::Down => strip * 16 + g + 8 * upper,
                };
                if row >= experts.rows {
                    continue;
                }
                let row = expert * experts.rows + row;
                for col in 0..experts.cols {
                    let (tile, half, inside) = (col / 64, col / 32 % 2, col % 32);
                    let (pair, t, second) = (inside / 8, inside % 8 / 2, inside % 2);
                    let code = experts.codes[(row * experts.cols + col) / 2] >> (4 * (col % 2)) & 15;
                    let word = tile * 512 + (g * 4 + t) * 16 + (half * 2 + upper) * 4;
                    let bits = place(code, pair) << (16 * second);
                    for (i, byte) in bits.to_le_bytes().into_iter().enumerate() {
                        out[word + i] |= byte;
                    }
                    let scale = strips.tiles * 512 + tile * 32 + g * 4 + half * 2 + upper;
                    out[scale] = experts.scales[(row * experts.cols + col) / 32];
                }
            }
        }
    }
    bytes
}

#[test]
fn masks_and_shifts_give_each_code_times_2_to_the_minus_14() {
    for (low, high) in (0..16_u8).flat_map(|low| (0..16_u8).map(move |high| (low, high))) {
        let word: u32 = (0..4).map(|pair| place(low, pair) | place(high, pair) << 16).sum();
        let pairs = [
            word & 0x8e00_8e00,
            (word << 3) & 0x8e00_8e00,
            ((word << 1) & 0x8000_8000) | ((word << 6) & 0x0e00_0e00),
            ((word << 2) & 0x8000_8000) | ((word << 9) & 0x0e00_0e00),
        ];
        for pair in pairs {
            for (bits, code) in [(pair as u16, low), ((pair >> 16) as u16, high)] {
                let value = f64::from(f16::from_bits(bits)) * 16384.0;
                assert_eq!(value.to_bits(), CODES[code as usize].to_bits(), "code {code}");
            }
        }
    }
}

#[test]
fn pack_mxfp4_lays_experts_out_as_described() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (experts, rows, cols, kind) in [
        (3, 96, 32, Rows::GateUp),
        (2, 128, 192, Rows::GateUp),
        (3, 40, 96, Rows::Down),
        (1, 16, 64, Rows::Down),
        (2, 320, 2880, Rows::Down),
    ] {
        let source = Experts::random(&mut random, experts, (rows, cols), (1, 254));
        let got = source.pack(&device, kind);
        let got = got.read(0, got.len()).unwrap();
        let want = reference(&source, kind);
        let wrong = got.iter().zip(&want).position(|(got, want)| got != want);
        assert_eq!((got.len(), wrong), (want.len(), None), "{experts} x {rows} x {cols}");
    }
}
