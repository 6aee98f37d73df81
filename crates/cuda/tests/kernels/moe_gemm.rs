use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::moe_gemm::{Call, MoeGemm};
use half::f16;

use crate::common::{Random, assert_rows, device, from_f16, to_f16};
use crate::sorted_rows::{Kind, Layout, definition};

const HEIGHTS: [usize; 3] = [64, 160, 256];

/// Strips of all experts: random codes, given scale bytes.
struct Strips {
    bytes: Vec<u8>,
    rows: usize,
    cols: usize,
}

impl Strips {
    /// `scale` gives a byte for (strip row of all experts, block of 32 columns).
    fn random(
        random: &mut Random,
        experts: usize,
        rows: usize,
        cols: usize,
        mut scale: impl FnMut(&mut Random, usize, usize) -> u8,
    ) -> Self {
        let (tiles, strips) = (cols / 64, experts * rows / 16);
        let mut bytes = vec![0; strips * tiles * 544];
        for (strip, bytes) in bytes.chunks_mut(tiles * 544).enumerate() {
            let (codes, scales) = bytes.split_at_mut(tiles * 512);
            codes.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.bits().to_le_bytes()));
            for (at, byte) in scales.iter_mut().enumerate() {
                let (tile, g, place) = (at / 32, at / 4 % 8, at % 4);
                *byte = scale(random, strip * 16 + place % 2 * 8 + g, tile * 2 + place / 2);
            }
        }
        Self { bytes, rows, cols }
    }

    fn strip(&self, row: usize) -> &[u8] {
        let bytes = self.cols / 64 * 544;
        &self.bytes[row / 16 * bytes..][..bytes]
    }

    /// Scale byte of a strip row of all experts.
    fn scale(&self, row: usize, block: usize) -> u8 {
        let place = block % 2 * 2 + row % 16 / 8;
        self.strip(row)[self.cols / 64 * 512 + block / 2 * 32 + row % 8 * 4 + place]
    }

    /// Weight by kernels/README.md.
    fn weight(&self, row: usize, col: usize) -> f64 {
        const MAGNITUDES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let (tile, half, inside) = (col / 64, col / 32 % 2, col % 32);
        let (pair, t, second) = (inside / 8, inside % 8 / 2, inside % 2);
        let lane = row % 8 * 4 + t;
        let at = tile * 512 + lane * 16 + (half * 2 + row % 16 / 8) * 4 + second * 2;
        let strip = self.strip(row);
        let bits = u16::from_le_bytes([strip[at], strip[at + 1]]);
        let (sign, magnitude) = [(15, 9), (12, 6), (14, 3), (13, 0)][pair];
        let value = MAGNITUDES[usize::from(bits >> magnitude & 7)];
        let value = if bits >> sign & 1 == 1 { -value } else { value };
        value * 2_f64.powi(i32::from(self.scale(row, col / 32)) - 127)
    }
}

/// A plain range of scales.
fn usual(random: &mut Random, _: usize, _: usize) -> u8 {
    118 + random.below(5) as u8
}

/// What a run is made of.
struct Case {
    strips: Strips,
    layout: Layout,
    bias: Vec<f32>,
    /// `[sorted rows, cols]`.
    x: Vec<u16>,
}

impl Case {
    fn new(strips: Strips, rows_of: &[usize], height: usize, bias: Vec<f32>) -> Self {
        Self { strips, layout: Layout::new(rows_of, height), bias, x: Vec::new() }
    }

    /// Inputs that pick one column each, with this value.
    fn pick(&mut self, value: f16, column: impl Fn(usize) -> usize) {
        let (rows, cols) = (self.layout.sorted_rows, self.strips.cols);
        self.x = vec![0; rows * cols];
        (0..rows).for_each(|row| self.x[row * cols + column(row)] = value.to_bits());
    }

    fn run(&self, device: &Device, gemm: &MoeGemm, kind: Kind) -> Vec<f64> {
        let Strips { rows, cols, .. } = self.strips;
        let all = self.layout.experts * rows;
        let w = device.upload(&self.strips.bytes).unwrap();
        let exponents = device.zeros(all).unwrap();
        gemm.exponents(device, &w, &exponents, all, cols).unwrap();
        self.layout.run(device, kind, [rows, cols], (&self.bias, &self.x), from_f16, |rows| {
            gemm.issue(device, &Call { w: &w, exponents: &exponents, rows }).unwrap();
        })
    }

    /// Element of the result by definition.
    fn definition(&self, kind: Kind, sorted_row: usize, out: usize) -> f64 {
        let Strips { rows, cols, .. } = self.strips;
        let first = self.layout.expert(sorted_row) * rows;
        let x = from_f16(&self.x[sorted_row * cols..][..cols]);
        let product = |row: usize| -> f64 {
            x.iter().enumerate().map(|(col, x)| x * self.strips.weight(first + row, col)).sum()
        };
        definition(kind, out, product, |at| f64::from(self.bias[first + at]))
    }

    /// Holds a result against the definition at some places.
    fn check(&self, kind: Kind, got: &[f64], places: &[(usize, usize)], width: usize) {
        let Strips { rows, cols, .. } = self.strips;
        let outs = kind.outs(rows);
        let want: Vec<f64> = places.iter().map(|&(row, out)| self.definition(kind, row, out)).collect();
        let sample: Vec<f64> = places.iter().map(|&(row, out)| got[row * outs + out]).collect();
        assert!(got.iter().all(|v| v.is_finite()));
        let what =
            format!("{kind:?} {rows}x{cols}, {} experts, height {}", self.layout.experts, self.layout.height);
        assert_rows(&what, &sample, &want, width, limit(kind));
    }
}

fn limit(kind: Kind) -> f64 {
    match kind {
        Kind::GateUp => 6e-4,
        Kind::F32 => 1e-5,
        Kind::Bf16 => 3e-3,
    }
}

/// With activations that pick one column each, any mistake of layout shows as a weight from elsewhere, by name.
fn check_puts_every_weight_in_its_place(device: &Device, gemm: &MoeGemm) {
    let mut random = Random::new();
    for height in HEIGHTS {
        let (rows, cols, rows_of) = (208, 192, [200, 0, 37, 8]);
        let strips = Strips::random(&mut random, rows_of.len(), rows, cols, usual);
        let mut case = Case::new(strips, &rows_of, height, vec![0.0; rows_of.len() * rows]);
        let picks = |row: usize| (row * 13 + 5) % cols;
        case.pick(f16::ONE, picks);
        let got = case.run(device, gemm, Kind::F32);
        case.layout.assert_weights(&got, rows, |row, out| {
            case.strips.weight(case.layout.expert(row) * rows + out, picks(row))
        });
    }
}

fn check_equals_its_definition(device: &Device, gemm: &MoeGemm) {
    let mut random = Random::new();
    for (at, rows_of) in [
        vec![1],
        vec![3, 0, 16, 17],
        vec![0, 33, 8, 64, 65],
        vec![0, 0, 130, 257],
        vec![256, 190, 12],
        vec![0, 0],
    ]
    .iter()
    .enumerate()
    {
        for kind in [Kind::GateUp, Kind::F32, Kind::Bf16] {
            for height in HEIGHTS {
                let cols = [64, 128, 192, 320, 448][(at + height) % 5];
                let rows = if kind == Kind::GateUp { [128, 384][at % 2] } else { [64, 144, 272][at % 3] };
                let strips = Strips::random(&mut random, rows_of.len(), rows, cols, usual);
                let bias = random.units(rows_of.len() * rows, 1.0);
                let mut case = Case::new(strips, rows_of, height, bias);
                case.x = to_f16(&random.units(case.layout.sorted_rows * cols, 3.0));
                let got = case.run(device, gemm, kind);
                let outs = kind.outs(rows);
                case.check(kind, &got, &case.layout.ends_and_some(outs), outs);
            }
        }
    }
}

/// Scale bytes from 0 to 254. Within 24 of a row's largest a weight is exact; below, the error is 2^-24 of the largest.
fn check_takes_every_scale(device: &Device, gemm: &MoeGemm) {
    let mut random = Random::new();
    let (rows, cols, rows_of) = (256, 128, [40, 9]);
    for height in [64, 256] {
        let mut base = vec![0; rows_of.len() * rows];
        base.iter_mut().for_each(|base| *base = random.below(255));
        (base[0], base[1], base[2], base[3]) = (0, 254, 1, 253);
        let strips = Strips::random(&mut random, rows_of.len(), rows, cols, |random, row, block| {
            let spread = [1, 30, 255][row % 3];
            if block == 0 { base[row] as u8 } else { base[row].saturating_sub(random.below(spread)) as u8 }
        });
        let mut case = Case::new(strips, &rows_of, height, vec![0.0; rows_of.len() * rows]);
        let picks = |row: usize| (row * 29 + 3) % cols;
        case.pick(f16::from_f32(1.0 / 64.0), picks);
        let got = case.run(device, gemm, Kind::F32);
        for (at, got) in got.iter().enumerate() {
            let (row, out) = (at / rows, at % rows);
            let weight_row = case.layout.expert(row) * rows + out;
            let largest = (0..cols / 32).map(|block| case.strips.scale(weight_row, block)).max().unwrap();
            let here = case.strips.scale(weight_row, picks(row) / 32);
            let want = case.strips.weight(weight_row, picks(row)) / 64.0;
            let unit = 2_f64.powi(i32::from(largest) - 127) / 64.0;
            let slack = if largest - here <= 23 { 0.0 } else { unit * 2_f64.powi(-24) };
            // float32 itself ends at 2^-149.
            let slack = slack.max(2_f64.powi(-150));
            assert!(
                (got - want).abs() <= slack,
                "height {height}, sorted row {row}, out {out}: {got:e}, want {want:e}, scale {here} of {largest}"
            );
        }
    }
}

/// The model's own shapes, checked at sampled elements.
fn check_of_real_shapes(device: &Device, gemm: &MoeGemm) {
    let mut random = Random::new();
    let rows_of = [300, 0, 1, 700, 256, 64, 13, 500];
    for (kind, rows, height) in [(Kind::GateUp, 5760), (Kind::Bf16, 2880)]
        .into_iter()
        .flat_map(|(kind, rows)| HEIGHTS.map(|height| (kind, rows, height)))
    {
        let strips = Strips::random(&mut random, rows_of.len(), rows, 2880, usual);
        let bias = random.units(rows_of.len() * rows, 1.0);
        let mut case = Case::new(strips, &rows_of, height, bias);
        case.x = to_f16(&random.units(case.layout.sorted_rows * 2880, 1.0));
        let got = case.run(device, gemm, kind);
        let places = case.layout.anywhere(&mut random, 2000, 2880);
        case.check(kind, &got, &places, places.len());
    }
}

#[test]
fn moe_gemm_puts_every_weight_in_its_place() {
    let Some((device, _turn)) = device() else { return };
    check_puts_every_weight_in_its_place(&device, &MoeGemm::load(&device).unwrap());
}

/// KRN-02.
#[test]
fn moe_gemm_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    check_equals_its_definition(&device, &MoeGemm::load(&device).unwrap());
}

#[test]
fn moe_gemm_takes_every_scale() {
    let Some((device, _turn)) = device() else { return };
    check_takes_every_scale(&device, &MoeGemm::load(&device).unwrap());
}

/// KRN-02.
#[test]
fn moe_gemm_of_real_shapes() {
    let Some((device, _turn)) = device() else { return };
    check_of_real_shapes(&device, &MoeGemm::load(&device).unwrap());
}

/// KRN-02: without wgmma.
#[test]
fn moe_gemm_portable_passes_the_same() {
    let Some((device, _turn)) = device() else { return };
    let gemm = MoeGemm::portable(&device).unwrap();
    check_puts_every_weight_in_its_place(&device, &gemm);
    check_equals_its_definition(&device, &gemm);
    check_takes_every_scale(&device, &gemm);
    check_of_real_shapes(&device, &gemm);
}
