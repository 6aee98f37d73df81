//! A whole answer from its steps.

use ctxserve_chat::Collector;
use ctxserve_core::{TokenId, TokenLogprobs};

use super::choice::{ChoiceEnd, Step};
use super::run::Generation;
use crate::error::ApiError;

/// Steps of one choice, gathered.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    pub(crate) message: Collector,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) token_ids: Vec<TokenId>,
    pub(crate) end: Option<ChoiceEnd>,
}

impl Gathered {
    /// Takes the next step.
    pub(crate) fn add(&mut self, step: Step) {
        for delta in &step.deltas {
            self.message.add(delta);
        }
        self.logprobs.extend(step.logprobs);
        self.token_ids.extend(step.token_ids);
        self.end = step.end.or(self.end.take());
    }

    /// Runs a generation of `n` choices to its end.
    ///
    /// # Errors
    /// The first choice that failed.
    pub(crate) async fn all(generation: &mut Generation, n: usize) -> Result<Vec<Self>, ApiError> {
        let mut gathered: Vec<Self> = (0..n).map(|_| Self::default()).collect();
        while let Some(next) = generation.next().await {
            let (index, step) = next?;
            if let Some(choice) = gathered.get_mut(index) {
                choice.add(step);
            }
        }
        Ok(gathered)
    }
}
