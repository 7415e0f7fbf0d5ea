//! Behaviours, chats and templates on one side, token batches on the other.

mod batch;
mod example;
mod layout;

pub use batch::{Batch, Selection, Targets};
pub use example::{Continuation, ContinuationKind, Example, TokenKind, Tokens};
pub use layout::{Layout, RowLayout, Side, Target};
