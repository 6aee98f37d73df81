//! What the tests of the experts' products over sorted rows have in common.

use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::sorted_rows::{Output, SortedRows};

use crate::common::{Random, from_bf16, panel, to_panels};
use crate::moe_sort::sorted;

const ALPHA: f32 = 1.702;
const LIMIT: f32 = 7.0;
/// Rows beyond the sorted ones, which nothing may write.
const SPARE: usize = 24;

/// What becomes of the sums.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    GateUp,
    F32,
    Bf16,
}

impl Kind {
    /// Elements of a row of the result, of `rows` weight rows.
    pub(crate) fn outs(self, rows: usize) -> usize {
        if self == Self::GateUp { rows / 2 } else { rows }
    }
}

/// How rows lie, by expert.
pub(crate) struct Layout {
    pub(crate) experts: usize,
    pub(crate) sorted_rows: usize,
    pub(crate) height: usize,
    tiles: Vec<[i32; 4]>,
}

impl Layout {
    /// `rows_of` says how many rows each expert has before padding.
    pub(crate) fn new(rows_of: &[usize], height: usize) -> Self {
        let choice: Vec<i32> =
            rows_of.iter().enumerate().flat_map(|(expert, &rows)| vec![expert as i32; rows]).collect();
        let sorted = sorted(&choice, 1, rows_of.len(), height);
        Self { experts: rows_of.len(), sorted_rows: sorted.source.len(), height, tiles: sorted.tiles }
    }

    pub(crate) fn expert(&self, sorted_row: usize) -> usize {
        let row = sorted_row as i32;
        self.tiles.iter().find(|tile| (tile[1]..tile[1] + tile[2]).contains(&row)).unwrap()[0] as usize
    }

    /// Runs what `issue` issues on `x` of `[sorted rows, cols]`; rows of the result, row-major, gated ones read by `gated`. Checks that
    /// nothing else was written.
    pub(crate) fn run(
        &self,
        device: &Device,
        kind: Kind,
        [rows, cols]: [usize; 2],
        (bias, x): (&[f32], &[u16]),
        gated: fn(&[u16]) -> Vec<f64>,
        issue: impl FnOnce(SortedRows<'_>),
    ) -> Vec<f64> {
        let capacity = self.sorted_rows + SPARE;
        let outs = kind.outs(rows);
        let mut y16 = device.allocate::<u16>(capacity * outs).unwrap();
        let mut y32 = device.allocate::<f32>(capacity * outs).unwrap();
        y16.fill(0xff).unwrap();
        y32.fill(0xff).unwrap();
        issue(SortedRows {
            bias: &device.upload(bias).unwrap(),
            x: &device.upload(&to_panels(x, cols, capacity)).unwrap(),
            y: match kind {
                Kind::GateUp => Output::SwiGlu { y: &y16, alpha: ALPHA, limit: LIMIT },
                Kind::F32 => Output::F32(&y32),
                Kind::Bf16 => Output::Bf16(&y16),
            },
            tiles: &device.upload(&[self.tiles.as_flattened(), &[0; 4]].concat()).unwrap(),
            counts: &device.upload(&[self.sorted_rows as i32, self.tiles.len() as i32]).unwrap(),
            experts: self.experts,
            rows,
            cols,
            capacity,
            height: self.height,
            most_tiles: self.tiles.len(),
        });
        let live = self.sorted_rows * outs;
        if kind == Kind::F32 {
            let y = y32.read(0, capacity * outs).unwrap();
            assert!(
                y[live..].iter().all(|v| v.to_bits() == u32::MAX),
                "rows beyond the sorted ones were written"
            );
            return y[..live].iter().map(|&v| f64::from(v)).collect();
        }
        let y = y16.read(0, capacity * outs).unwrap();
        let place = |row: usize, out: usize| {
            if kind == Kind::GateUp { panel(row, out, capacity) } else { row * outs + out }
        };
        let mut rest = (self.sorted_rows..capacity).flat_map(|row| (0..outs).map(move |out| (row, out)));
        assert!(
            rest.all(|(row, out)| y[place(row, out)] == u16::MAX),
            "rows beyond the sorted ones were written"
        );
        let values: Vec<u16> = (0..live).map(|at| y[place(at / outs, at % outs)]).collect();
        if kind == Kind::GateUp { gated(&values) } else { from_bf16(&values) }
    }

    /// What is wrong where each result is one weight, which `weight` knows by (sorted row, output).
    pub(crate) fn assert_weights(&self, got: &[f64], rows: usize, weight: impl Fn(usize, usize) -> f64) {
        let wrong: Vec<String> = (0..self.sorted_rows * rows)
            .filter_map(|at| {
                let (row, out) = (at / rows, at % rows);
                let want = weight(row, out);
                (got[at] != want).then(|| format!("(sorted row {row}, out {out}): {}, want {want}", got[at]))
            })
            .collect();
        let height = self.height;
        assert!(
            wrong.is_empty(),
            "height {height}: {} wrong, {:#?}",
            wrong.len(),
            &wrong[..wrong.len().min(12)]
        );
    }

    /// Elements to compare with the definition: all of the first and last sorted rows, some of the others.
    pub(crate) fn ends_and_some(&self, outs: usize) -> Vec<(usize, usize)> {
        let checked = (0..self.sorted_rows).filter(|row| row % 7 == 0 || row + 9 > self.sorted_rows);
        checked.flat_map(|row| (0..outs).map(move |out| (row, out))).collect()
    }

    /// Elements anywhere.
    pub(crate) fn anywhere(&self, random: &mut Random, count: usize, outs: usize) -> Vec<(usize, usize)> {
        (0..count).map(|_| (random.below(self.sorted_rows), random.below(outs))).collect()
    }
}

/// An output by definition, of products with weight rows and of an expert's biases.
pub(crate) fn definition(
    kind: Kind,
    out: usize,
    product: impl Fn(usize) -> f64,
    bias: impl Fn(usize) -> f64,
) -> f64 {
    if kind != Kind::GateUp {
        return product(out) + bias(out);
    }
    let row = out / 8 * 16 + out % 8;
    let (gate, up) = (product(row) + bias(2 * out), product(row + 8) + bias(2 * out + 1));
    let (gate, up) = (gate.min(f64::from(LIMIT)), up.clamp(-f64::from(LIMIT), f64::from(LIMIT)));
    gate / (1.0 + (-f64::from(ALPHA) * gate).exp()) * (up + 1.0)
}
