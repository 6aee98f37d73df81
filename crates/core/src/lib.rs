//! Plain data shared by every layer: ids, requests, events, sampling parameters, errors.
//!
//! Nothing here does IO, knows a wire format or owns a thread, so every crate may depend on it.

mod constraint;
mod decode;
mod event;
mod ids;
mod request;
mod sampling;
mod weights;

pub use constraint::{Allowed, Constraint, ConstraintError, Guide, TokenMask};
pub use decode::{E2M1, e4m3, e8m0};
pub use event::{Event, FinishReason, StopCause, TokenEvent, TokenLogprob, TokenLogprobs, Usage};
pub use ids::{RequestId, TokenId};
pub use request::{GenerateRequest, StopRules};
pub use sampling::{ParamError, SamplingParams, limits};
pub use weights::{Elements, Encoding, MXFP4_BLOCK, Matrix, NVFP4_BLOCK, Nvfp4Run};
