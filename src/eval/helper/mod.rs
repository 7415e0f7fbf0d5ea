//! Chat models that help to attack and to judge: in this process, or behind HTTP.

pub(super) mod chat_model;
mod endpoint;
pub(super) mod guard;

pub use chat_model::{ChatFailure, ChatModel, LocalChat, Reply, ReplySettings};
pub use endpoint::{Endpoint, EndpointSettings};
pub use guard::CONTROL_TEXTS;
