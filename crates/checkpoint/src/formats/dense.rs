//! No quantisation: floats under Hugging Face names.
//!
//! Matrices are `[out, in]`. gpt-oss expert stacks are the exception, stored `[E, in, out]`. `down_proj` may
//! be square, and then its shape does not show which way round it is; so the two stacks of a layer are read
//! together: `gate_up_proj` has twice the intermediate width on its output side, `down_proj` once on its
//! input side, and no pair of shapes fits both ways.

use std::ops::Range;

use ctxserve_core::Elements;

use super::{QuantFormat, Row, load_plain, misused, plain};
use crate::check::{Extent, Part, Shape, Want};
use crate::error::CheckpointError;
use crate::store::{Store, Stored};
use crate::transpose;
use crate::values::FLOATS;

pub(super) const ROW: Row =
    Row { name: NAME, claims: |method| method.is_none(), open: |_| Ok(Box::new(Dense)) };

const NAME: &str = "dense";

#[derive(Debug)]
struct Dense;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Orientation {
    /// `[E, in, out]`.
    InOut,
    /// `[E, out, in]`.
    OutIn,
}

impl QuantFormat for Dense {
    fn name(&self) -> &'static str {
        NAME
    }

    fn verify(&self, store: &Store) -> Result<(), CheckpointError> {
        match store.iter().find(|tensor| !FLOATS.contains(&tensor.dtype())) {
            None => Ok(()),
            Some(tensor) => {
                let dtype = tensor.dtype();
                Err(tensor.error(format!("is {dtype}, but config.json declares no quantization")))
            }
        }
    }

    fn parts(&self, store: &Store, want: &Want) -> Result<Vec<Part>, String> {
        let Shape::Experts { experts, rows, cols } = want.shape else { return Ok(vec![plain(want)]) };
        // Where the pair does not tell, something is missing or mis-shaped: then it is reported against the
        // layout that such checkpoints have.
        let extent = match orientation(store, &want.name).unwrap_or(Orientation::InOut) {
            Orientation::InOut => vec![experts, cols, rows],
            Orientation::OutIn => vec![experts, rows, cols],
        };
        Ok(vec![Part { extent: Extent::Exact(extent), ..plain(want) }])
    }

    fn load(
        &self,
        store: &Store,
        want: &Want,
        parts: &[Stored<'_>],
        rows: Range<usize>,
    ) -> Result<Elements, CheckpointError> {
        let Shape::Experts { rows: height, cols, .. } = want.shape else {
            return load_plain(want, parts, rows);
        };
        let [tensor] = parts else { return Err(misused(want)) };
        match orientation(store, &want.name) {
            Some(Orientation::InOut) => {
                let expert = |row: usize| row.checked_div(height).unwrap_or(0);
                transpose::read(*tensor, expert(rows.start)..expert(rows.end), height, cols)
            }
            Some(Orientation::OutIn) => load_plain(want, parts, rows),
            None => Err(tensor.error(
                "orientation unknown: the shapes of gate_up_proj and down_proj fit together neither as \
                 [E, in, out] nor as [E, out, in]"
                    .to_owned(),
            )),
        }
    }
}

/// Which way round the expert stacks of the layer of `name` are, from the shapes of both.
fn orientation(store: &Store, name: &str) -> Option<Orientation> {
    let (layer, _) = name.rsplit_once('.')?;
    let shape = |leaf: &str| match *store.get(&format!("{layer}.{leaf}"))?.shape() {
        [_, a, b] => Some((a, b)),
        _ => None,
    };
    let (gate_up, down) = (shape("gate_up_proj")?, shape("down_proj")?);
    let fits = |gate_up: (usize, usize), down: (usize, usize)| {
        // As (in, out): the hidden size enters one and leaves the other, the intermediate size twice in gate_up.
        gate_up.0 > 0 && gate_up.0 == down.1 && down.0.checked_mul(2) == Some(gate_up.1)
    };
    let turned = |(a, b)| (b, a);
    match (fits(gate_up, down), fits(turned(gate_up), turned(down))) {
        (true, false) => Some(Orientation::InOut),
        (false, true) => Some(Orientation::OutIn),
        _ => None,
    }
}
