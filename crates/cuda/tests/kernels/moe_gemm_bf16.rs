use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::moe_gemm_bf16::{Call, MoeGemmBf16, Output};
use half::bf16;

use crate::common::{Random, assert_rows, device, from_bf16, panel, to_bf16, to_panels};
use crate::moe_sort::sorted;

/// Outputs are rounded to bf16, each by at most 2^-8 of itself; a row may be little but one large element.
const ROUNDED: f64 = 4e-3;

const HEIGHTS: [usize; 5] = [16, 32, 64, 128, 256];
const ALPHA: f32 = 1.702;
const LIMIT: f32 = 7.0;
/// Rows of weights, biases and activations around what is used, poisoned.
const SPARE: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    GateUp,
    Down,
}

/// What a run is made of; `rows_of` says how many sorted rows each expert has before padding.
struct Case {
    experts: usize,
    rows: usize,
    cols: usize,
    /// `[experts * rows, cols]`.
    w: Vec<u16>,
    /// `[experts * rows]`.
    bias: Vec<f32>,
    /// `[sorted rows, cols]`.
    x: Vec<u16>,
    sorted_rows: usize,
    tiles: Vec<[i32; 4]>,
    height: usize,
}

impl Case {
    fn new(random: &mut Random, rows_of: &[usize], [rows, cols]: [usize; 2], height: usize) -> Self {
        let choice: Vec<i32> =
            rows_of.iter().enumerate().flat_map(|(expert, &rows)| vec![expert as i32; rows]).collect();
        let sorted = sorted(&choice, 1, rows_of.len(), height);
        let (experts, sorted_rows) = (rows_of.len(), sorted.source.len());
        let scale = (cols as f32).sqrt().recip() * 3.0;
        Self {
            experts,
            rows,
            cols,
            w: to_bf16(&random.units(experts * rows * cols, scale)),
            bias: random.units(experts * rows, 1.0),
            x: to_bf16(&random.units(sorted_rows * cols, 3.0)),
            sorted_rows,
            tiles: sorted.tiles,
            height,
        }
    }

    fn expert(&self, sorted_row: usize) -> usize {
        let row = sorted_row as i32;
        self.tiles.iter().find(|tile| (tile[1]..tile[1] + tile[2]).contains(&row)).unwrap()[0] as usize
    }

    /// Runs it; rows of the result, row-major. Checks that nothing else was written.
    fn run(&self, device: &Device, gemm: &MoeGemmBf16, kind: Kind) -> Vec<f64> {
        let Self { rows, cols, experts, .. } = *self;
        let capacity = self.sorted_rows + SPARE;
        let outs = if kind == Kind::GateUp { rows / 2 } else { rows };
        let mut y = device.allocate::<u16>(capacity * outs).unwrap();
        y.fill(0xff).unwrap();
        let call = Call {
            w: &device.upload(&to_panels(&self.w, cols, experts * rows)).unwrap(),
            bias: &device.upload(&self.bias).unwrap(),
            x: &device.upload(&to_panels(&self.x, cols, capacity)).unwrap(),
            y: match kind {
                Kind::GateUp => Output::SwiGlu { y: &y, alpha: ALPHA, limit: LIMIT },
                Kind::Down => Output::Bf16(&y),
            },
            tiles: &device.upload(&[self.tiles.as_flattened(), &[0; 4]].concat()).unwrap(),
            counts: &device.upload(&[self.sorted_rows as i32, self.tiles.len() as i32]).unwrap(),
            experts,
            rows,
            cols,
            capacity,
            height: self.height,
            most_tiles: self.tiles.len(),
        };
        gemm.issue(device, &call).unwrap();
        let y = y.read(0, capacity * outs).unwrap();
        let place = |row: usize, out: usize| {
            if kind == Kind::GateUp { panel(row, out, capacity) } else { row * outs + out }
        };
        let mut rest = (self.sorted_rows..capacity).flat_map(|row| (0..outs).map(move |out| (row, out)));
        assert!(
            rest.all(|(row, out)| y[place(row, out)] == u16::MAX),
            "rows beyond the sorted ones were written"
        );
        let live = self.sorted_rows * outs;
        from_bf16(&(0..live).map(|at| y[place(at / outs, at % outs)]).collect::<Vec<u16>>())
    }

    /// Element of the result by definition.
    fn definition(&self, kind: Kind, sorted_row: usize, out: usize) -> f64 {
        let Self { rows, cols, .. } = *self;
        let expert = self.expert(sorted_row);
        let x = &self.x[sorted_row * cols..][..cols];
        let value = |bits: u16| f64::from(bf16::from_bits(bits));
        let product = |row: usize| -> f64 {
            let w = &self.w[(expert * rows + row) * cols..][..cols];
            x.iter().zip(w).map(|(&x, &w)| value(x) * value(w)).sum()
        };
        let bias = |at: usize| f64::from(self.bias[expert * rows + at]);
        if kind == Kind::Down {
            return product(out) + bias(out);
        }
        let row = out / 8 * 16 + out % 8;
        let (gate, up) = (product(row) + bias(2 * out), product(row + 8) + bias(2 * out + 1));
        let (gate, up) = (gate.min(f64::from(LIMIT)), up.clamp(-f64::from(LIMIT), f64::from(LIMIT)));
        gate / (1.0 + (-f64::from(ALPHA) * gate).exp()) * (up + 1.0)
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
        (0..case.sorted_rows).for_each(|row| case.x[row * cols + picks(row)] = bf16::ONE.to_bits());
        let got = case.run(device, gemm, Kind::Down);
        let wrong: Vec<String> = (0..case.sorted_rows * rows)
            .filter_map(|at| {
                let (row, out) = (at / rows, at % rows);
                let bits = case.w[(case.expert(row) * rows + out) * cols + picks(row)];
                let want = f64::from(bf16::from_bits(bits));
                (got[at] != want).then(|| format!("(sorted row {row}, out {out}): {}, want {want}", got[at]))
            })
            .collect();
        assert!(
            wrong.is_empty(),
            "height {height}: {} wrong, {:#?}",
            wrong.len(),
            &wrong[..wrong.len().min(12)]
        );
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
        for kind in [Kind::GateUp, Kind::Down] {
            for height in HEIGHTS {
                let cols = [64, 128, 192, 320, 448][(at + height / 16) % 5];
                let rows = if kind == Kind::GateUp { [128, 384][at % 2] } else { [64, 144, 272][at % 3] };
                let case = Case::new(&mut random, rows_of, [rows, cols], height);
                let got = case.run(device, gemm, kind);
                let outs = if kind == Kind::GateUp { rows / 2 } else { rows };
                // All of the first and last sorted rows, some of the others.
                let checked: Vec<usize> =
                    (0..case.sorted_rows).filter(|row| row % 7 == 0 || row + 9 > case.sorted_rows).collect();
                let pick = |of: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                    checked
                        .iter()
                        .flat_map(|&row| (0..outs).map(move |out| (row, out)))
                        .map(|(r, o)| of(r, o))
                        .collect()
                };
                let want = pick(&|row, out| case.definition(kind, row, out));
                let sample = pick(&|row, out| got[row * outs + out]);
                assert!(got.iter().all(|v| v.is_finite()));
                let what = format!("{kind:?} {rows}x{cols} {rows_of:?} height {height}");
                assert_rows(&what, &sample, &want, outs, ROUNDED);
            }
        }
    }
}

/// The model's own shapes, checked at sampled elements.
fn check_of_real_shapes(device: &Device, gemm: &MoeGemmBf16) {
    let mut random = Random::new();
    for (kind, rows, height) in [(Kind::GateUp, 5760), (Kind::Down, 2880)]
        .into_iter()
        .flat_map(|(kind, rows)| HEIGHTS.map(|height| (kind, rows, height)))
    {
        let rows_of: &[usize] =
            if height <= 64 { &[1, height, 5, height / 2 + 1] } else { &[300, 0, 1, 530] };
        let case = Case::new(&mut random, rows_of, [rows, 2880], height);
        let got = case.run(device, gemm, kind);
        let places: Vec<(usize, usize)> =
            (0..1000).map(|_| (random.below(case.sorted_rows), random.below(2880))).collect();
        let want: Vec<f64> = places.iter().map(|&(row, out)| case.definition(kind, row, out)).collect();
        let sample: Vec<f64> = places.iter().map(|&(row, out)| got[row * 2880 + out]).collect();
        assert!(got.iter().all(|v| v.is_finite()));
        assert_rows(&format!("{kind:?} {rows}x2880 height {height}"), &sample, &want, want.len(), ROUNDED);
    }
}

/// A sorted row's result has the same bits whatever rows lie beside it in its tile.
fn check_does_not_depend_on_neighbours(device: &Device, gemm: &MoeGemmBf16) {
    let mut random = Random::new();
    for height in HEIGHTS {
        let mut case = Case::new(&mut random, &[23, height], [256, 512], height);
        for kind in [Kind::GateUp, Kind::Down] {
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
