//! Behaviours, chats and templates on one side, token batches on the other.

mod batch;
mod behaviors;
mod chat_format;
mod chats;
mod date;
mod encode;
mod example;
mod json_objects;
mod layout;
mod marks;
mod message;
mod multiple_choice;
mod overlap;
mod preferences;
mod python_json;
mod python_strings;
mod rendered;
mod report;
mod requests;
mod rows;
mod sampler;
mod special_tokens;
mod string_place;
mod strings;
mod table;
mod tags;
mod template;
mod template_engine;
#[cfg(test)]
mod test_tokenizers;
mod tokenizer;

pub use batch::{Batch, Selection, Targets};
pub use behaviors::{
    Behavior, BehaviorFiles, DEFAULT_SAFE_RESPONSE, load_behavior_pairs, load_behaviors, load_targets,
};
pub use chat_format::{ChatFormat, EncodedChat, Turns};
pub use chats::{ChatReader, save_chats};
pub use date::Date;
pub use encode::{encode_chats, encode_pairs};
pub use example::{Continuation, ContinuationKind, Example, TokenKind, Tokens};
pub use layout::{Layout, RowLayout, Side, Target};
pub use message::Message;
pub use multiple_choice::{MultipleChoice, load_arc, load_mmlu};
pub use overlap::RowIndex;
pub use preferences::load_preferences;
pub use report::{LoadReport, Note};
pub use requests::{Request, load_harmless, load_xstest};
pub use rows::{AnswerPair, Chat};
pub use sampler::{Sampler, SamplerSettings, Source, is_held_out, split_by_name};
pub use special_tokens::SpecialTokens;
pub use string_place::{PlacedString, StringPlace};
pub use strings::RandomStrings;
pub use template::{ChatTemplate, TemplatePreset};
pub use tokenizer::{TokenSpan, Tokenizer};
