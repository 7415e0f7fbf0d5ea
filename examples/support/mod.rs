//! What the examples share: the toy that they work on without arguments, and the job that they do with or without.
#![allow(dead_code, reason = "each example uses a part")]

mod allocator;
pub mod arguments;
pub mod assembly;
pub mod cases;
pub mod curve;
pub mod evaluation;
pub mod inputs;
pub mod job;
pub mod tasks;
pub mod toy;
pub mod watching;
