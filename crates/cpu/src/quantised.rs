//! Activations as int8, for the opt-in fast products.

use rayon::prelude::*;

use crate::packed::{BLOCK, HALVES, quantised_order};

/// Rows of activations, quantised per block of 32: `x = code * scale`, symmetric, 127 steps.
#[derive(Debug)]
pub(crate) struct Quantised {
    codes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    blocks: usize,
}

/// 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;

/// One row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuantRow<'a> {
    /// Codes of each block, in [`quantised_order`].
    pub(crate) codes: &'a [i8],
    /// Scale of each block.
    pub(crate) scales: &'a [f32],
    /// Sum of the codes of each half block: kernels that offset their weights to be unsigned subtract it again.
    pub(crate) sums: &'a [i32],
}

impl QuantRow<'_> {
    /// Sum of the codes of a block.
    pub(crate) fn sum(&self, block: usize) -> i32 {
        self.sums[HALVES * block..HALVES * (block + 1)].iter().sum()
    }
}

impl Quantised {
    /// Room for `rows` of `blocks` blocks.
    pub(crate) fn new(rows: usize, blocks: usize) -> Self {
        let count = rows * blocks;
        Self {
            codes: vec![0; count * BLOCK],
            scales: vec![0.0; count],
            sums: vec![0; HALVES * count],
            blocks,
        }
    }

    /// Quantises all rows of `cols` inputs, missing ones being zero, on the current pool.
    pub(crate) fn fill(&mut self, data: &[f32], cols: usize) {
        let blocks = self.blocks.max(1);
        let rows = self.codes.par_chunks_mut(blocks * BLOCK);
        let rows =
            rows.zip(self.scales.par_chunks_mut(blocks)).zip(self.sums.par_chunks_mut(HALVES * blocks));
        rows.zip(data.par_chunks(cols)).for_each(|(((codes, scales), sums), x)| {
            for (block, x) in x.chunks(BLOCK).enumerate() {
                let codes = &mut codes[block * BLOCK..][..BLOCK];
                let sums = &mut sums[HALVES * block..HALVES * (block + 1)];
                scales[block] = quantise(x, codes, sums);
            }
        });
    }

    /// One row.
    pub(crate) fn row(&self, row: usize) -> QuantRow<'_> {
        let (at, blocks) = (row * self.blocks, self.blocks);
        QuantRow {
            codes: &self.codes[at * BLOCK..][..blocks * BLOCK],
            scales: &self.scales[at..][..blocks],
            sums: &self.sums[HALVES * at..][..HALVES * blocks],
        }
    }
}

/// Quantises one block and sums the codes of its halves; returns its scale. A NaN or an infinity makes the scale NaN, so
/// that garbage stays visible.
fn quantise(x: &[f32], codes: &mut [i8], sums: &mut [i32]) -> f32 {
    let peak = x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
    let taint = x.iter().map(|x| x * 0.0).sum::<f32>();
    let inverse = if peak > 0.0 { 127.0 / peak } else { 0.0 };
    for (k, x) in x.iter().enumerate() {
        // Adding this constant leaves the nearest integer in the low bits, where `round` would be a call.
        let code = ((x * inverse + ROUND).to_bits().cast_signed() - ROUND.to_bits().cast_signed()) as i8;
        codes[quantised_order(k)] = code;
        sums[k / (BLOCK / HALVES)] += i32::from(code);
    }
    peak / 127.0 + taint
}
