//! Steps that are started before the last is collected.

use std::sync::Arc;

use ctxserve_core::TokenId;

use super::super::fixture::{Fixture, Loaded, POISON};
use super::super::schedule::singles;
use super::{Case, Suite, shape};
use crate::{Backend, Batch, DeviceError, SampleError, Sampled};

const ROWS: usize = 12;

fn ids(outcomes: &[Result<Sampled, SampleError>]) -> Vec<Option<TokenId>> {
    outcomes.iter().map(|outcome| outcome.as_ref().ok().map(|sampled| sampled.id)).collect()
}

impl Suite<'_> {
    /// Greedy single rows that pick ids of sound embeddings only, so that what they pick can be an input.
    fn feeders(&mut self, width: usize) -> Batch {
        let banned: Arc<[TokenId]> = (POISON..width as TokenId).collect();
        let mut batch = singles(self.tokens(ROWS), 2);
        for sample in batch.sequences.iter_mut().filter_map(|slice| slice.sample.as_mut()) {
            sample.banned = Arc::clone(&banned);
        }
        batch
    }

    /// With two steps in flight, a row fed by the first picks in the second what it picks when it is told the id. A
    /// backend that takes one step refuses feeds.
    pub(in super::super) fn feeds<B: Backend>(
        &mut self,
        make: &impl Fn() -> Result<B, DeviceError>,
    ) -> Result<(), DeviceError> {
        let fixture = Fixture::new(self.claims.fit(shape()), &mut self.random)?;
        self.fed(&mut fixture.load(make()?)?)
    }

    /// See [`Suite::feeds`].
    pub(super) fn fed<B: Backend>(&mut self, loaded: &mut Loaded<B>) -> Result<(), DeviceError> {
        let width = loaded.shape.hidden();
        let (first, mut second) = (self.feeders(width), self.feeders(width));
        // Every second row, from the other end of the first step.
        for (row, slice) in second.sequences.iter_mut().enumerate().step_by(2) {
            slice.feed = Some(ROWS - 1 - row);
            second.tokens[row] = 0;
        }
        let mut push = |name: &str, wrong: usize| {
            let error = if wrong == 0 { 0.0 } else { f64::INFINITY };
            self.cases.push(Case { name: name.to_owned(), error, limit: 0.0 });
        };
        if loaded.backend.steps_in_flight() < 2 {
            let known = loaded.start(&first)?;
            loaded.backend.collect(known)?;
            push("feeds, refused with one step in flight", usize::from(loaded.start(&second).is_ok()));
            return Ok(());
        }
        let pending = [loaded.start(&first)?, loaded.start(&second)?];
        let mut outcomes = Vec::new();
        for pending in pending {
            outcomes.push(ids(&loaded.backend.collect(pending)?));
        }
        let mut told = second;
        for (row, slice) in told.sequences.iter_mut().enumerate() {
            if let Some(id) = slice.feed.take().and_then(|feed| outcomes[0].get(feed).copied().flatten()) {
                told.tokens[row] = id;
            }
        }
        let (apart, whole) = (ids(&loaded.sample(&first)?), ids(&loaded.sample(&told)?));
        let differ = |got: &[Option<TokenId>], want: &[Option<TokenId>]| {
            let pairs = got.iter().zip(want).filter(|(got, want)| got != want || got.is_none());
            pairs.count() + got.len().abs_diff(ROWS)
        };
        push("feeds, the step that feeds", differ(&outcomes[0], &apart));
        push("feeds, the step that is fed", differ(&outcomes[1], &whole));
        Ok(())
    }
}
