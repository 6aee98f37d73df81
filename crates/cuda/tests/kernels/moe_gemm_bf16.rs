use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::moe_gemm_bf16::{Call, MoeGemmBf16};
use half::bf16;

use crate::common::{Random, assert_rows, device, from_bf16, to_bf16, to_panels};
use crate::sorted_rows::{Kind, Layout, definition};

/// Outputs are rounded to bf16, each by at most 2^-8 of itself; a row may be little but one large element.
const ROUNDED: f64 = 4e-3;

const HEIGHTS: [usize; 5] = [16, 32, 64, 128, 256];

/// What a run is made of.
struct Case {
    layout: Layout,
    rows: usize,
    cols: usize,
    /// `[experts * rows, cols]`.
    w: Vec<u16>,
    /// `[experts * rows]`.
    bias: Vec<f32>,
    /// `[sorted rows, cols]`.
    x: Vec<u16>,
}

impl Case {
    fn new(random: &mut Random, rows_of: &[usize], [rows, cols]: [usize; 2], height: usize) -> Self {
        let layout = Layout::new(rows_of, height);
        let scale = (cols as f32).sqrt().recip() * 3.0;
        Self {
            rows,
            cols,
            w: to_bf16(&random.units(layout.experts * rows * cols, scale)),
            bias: random.units(layout.experts * rows, 1.0),
            x: to_bf16(&random.units(layout.sorted_rows * cols, 3.0)),
            layout,
        }
    }

    fn run(&self, device: &Device, gemm: &MoeGemmBf16, kind: Kind) -> Vec<f64> {
        let Self { rows, cols, .. } = *self;
        let w = device.upload(&to_panels(&self.w, cols, self.layout.experts * rows)).unwrap();
        self.layout.run(device, kind, [rows, cols], (&self.bias, &self.x), from_bf16, |rows| {
            gemm.issue(device, &Call { w: &w, rows }).unwrap();
        })
    }

    /// Element of the result by definition.
    fn definition(&self, kind: Kind, sorted_row: usize, out: usize) -> f64 {
        let Self { rows, cols, .. } = *self;
        let first = self.layout.expert(sorted_row) * rows;
        let x = &self.x[sorted_row * cols..][..cols];
        let value = |bits: u16| f64::from(bf16::from_bits(bits));
        let product = |row: usize| -> f64 {
            let w = &self.w[(first + row) * cols..][..cols];
            x.iter().zip(w).map(|(&x, &w)| value(x) * value(w)).sum()
        };
        definition(kind, out, product, |at| f64::from(self.bias[first + at]))
    }

    /// Holds a result against the definition at some places.
    fn check(&self, kind: Kind, got: &[f64], places: &[(usize, usize)], width: usize) {
        let Self { rows, cols, .. } = *self;
        let outs = kind.outs(rows);
        let want: Vec<f64> = places.iter().map(|&(row, out)| self.definition(kind, row, out)).collect();
        let sample: Vec<f64> = places.iter().map(|&(row, out)| got[row * outs + out]).collect();
        assert!(got.iter().all(|v| v.is_finite()));
        let what =
            format!("{kind:?} {rows}x{cols}, {} experts, height {}", self.layout.experts, self.layout.height);
        assert_rows(&what, &sample, &want, width, ROUNDED);
    }
}

/// With activations that pick one column each, any mistake of layout shows as a weight from elsewhere.
fn check_puts_every_weight_in_its_place(device: &Device, gemm: &MoeGemmBf16) {
    let mut random = Random::new();
    for height in HEIGHTS {
        let rows_of = [1, 0, 70, 13, 8];
        let mut case = Case::new(&mut random, &rows_of, [208, 320], height);
        let (rows, cols) = (case.rows, case.cols);
        case.bias.fill(0.0);
        let picks = |row: usize| (row * 53 + 17) % cols;
        case.x.fill(0);
        let sorted_rows = case.layout.sorted_rows;
        (0..sorted_rows).for_each(|row| case.x[row * cols + picks(row)] = bf16::ONE.to_bits());
        let got = case.run(device, gemm, Kind::Bf16);
        case.layout.assert_weights(&got, rows, |row, out| {
            let bits = case.w[(case.layout.expert(row) * rows + out) * cols + picks(row)];
            f64::from(bf16::from_bits(bits))
        });
    }
}

fn check_equals_its_definition(device: &Device, gemm: &MoeGemmBf16) {
    let mut random = Random::new();
    for (at, rows_of) in [
        vec![1],
        vec![3, 0, 16, 17],
        vec![0, 33, 8, 64, 65],
        vec![0, 0, 130, 257],
        vec![256, 190, 12, 1, 1, 1, 40, 24, 30, 48, 96, 100, 150, 200, 230, 9, 16, 5, 2],
        vec![0, 0],
    ]
    .iter()
    .enumerate()
    {
        for kind in [Kind::GateUp, Kind::Bf16] {
            for height in HEIGHTS {
                let cols = [64, 128, 192, 320, 448][(at + height / 16) % 5];
                let rows = if kind == Kind::GateUp { [128, 384][at % 2] } else { [64, 144, 272][at % 3] };
                let case = Case::new(&mut random, rows_of, [rows, cols], height);
                let got = case.run(device, gemm, kind);
                let outs = kind.outs(rows);
                case.check(kind, &got, &case.layout.ends_and_some(outs), outs);
            }
        }
    }
}

/// The model's own shapes, checked at sampled elements.
fn check_of_real_shapes(device: &Device, gemm: &MoeGemmBf16) {
    let mut random = Random::new();
    for (kind, rows, height) in [(Kind::GateUp, 5760), (Kind::Bf16, 2880)]
        .into_iter()
        .flat_map(|(kind, rows)| HEIGHTS.map(|height| (kind, rows, height)))
    {
        let rows_of: &[usize] =
            if height <= 64 { &[1, height, 5, height / 2 + 1] } else { &[300, 0, 1, 530] };
        let case = Case::new(&mut random, rows_of, [rows, 2880], height);
        let got = case.run(device, gemm, kind);
        let places = case.layout.anywhere(&mut random, 1000, 2880);
        case.check(kind, &got, &places, places.len());
    }
}

/// A sorted row's result has the same bits whatever rows lie beside it in its tile.
fn check_does_not_depend_on_neighbours(device: &Device, gemm: &MoeGemmBf16) {
    let mut random = Random::new();
    for height in HEIGHTS {
        let mut case = Case::new(&mut random, &[23, height], [256, 512], height);
        for kind in [Kind::GateUp, Kind::Bf16] {
            let outs = if kind == Kind::GateUp { 128 } else { 256 };
            let before = case.run(device, gemm, kind);
            let kept = 24 + height / 2 - 1;
            let row = case.x[kept * 512..][..512].to_vec();
            case.x = to_bf16(&random.units(case.x.len(), 5.0));
            case.x[kept * 512..][..512].copy_from_slice(&row);
            let after = case.run(device, gemm, kind);
            assert!(before != after);
            assert_eq!(
                before[kept * outs..][..outs],
                after[kept * outs..][..outs],
                "{kind:?} height {height}"
            );
        }
    }
}

#[test]
fn moe_gemm_bf16_puts_every_weight_in_its_place() {
    let Some((device, _turn)) = device() else { return };
    check_puts_every_weight_in_its_place(&device, &MoeGemmBf16::load(&device).unwrap());
}

#[test]
fn moe_gemm_bf16_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    check_equals_its_definition(&device, &MoeGemmBf16::load(&device).unwrap());
}

#[test]
fn moe_gemm_bf16_of_real_shapes() {
    let Some((device, _turn)) = device() else { return };
    check_of_real_shapes(&device, &MoeGemmBf16::load(&device).unwrap());
}

#[test]
fn moe_gemm_bf16_does_not_depend_on_neighbours() {
    let Some((device, _turn)) = device() else { return };
    check_does_not_depend_on_neighbours(&device, &MoeGemmBf16::load(&device).unwrap());
}

#[test]
fn moe_gemm_bf16_portable_passes_the_same() {
    let Some((device, _turn)) = device() else { return };
    let gemm = MoeGemmBf16::portable(&device).unwrap();
    check_puts_every_weight_in_its_place(&device, &gemm);
    check_equals_its_definition(&device, &gemm);
    check_of_real_shapes(&device, &gemm);
    check_does_not_depend_on_neighbours(&device, &gemm);
}
