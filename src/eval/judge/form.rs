//! The text in which a judge is asked.

use super::Answered;
use crate::{
    Error, Result,
    digest::bytes_digest,
    eval::helper::guard::{Frame, control_texts_in},
};

/// A text with places for what is judged.
#[derive(Clone, Debug)]
pub(super) struct Form {
    text: String,
    /// What introduces a context in this form; without, the place for it is filled with the context alone.
    introduction: &'static str,
}

const BEHAVIOR: &str = "{behavior}";
const CONTEXT: &str = "{context}";
const GENERATION: &str = "{generation}";

impl Form {
    /// One of this crate's.
    pub(super) fn shipped(text: &str) -> Self {
        Self { text: text.to_string(), introduction: "What it is about:\n" }
    }

    /// One of the user's.
    ///
    /// # Errors
    /// If it lacks `{behavior}` or `{generation}`.
    pub(super) fn own(text: String) -> Result<Self> {
        match [BEHAVIOR, GENERATION].iter().find(|place| !text.contains(**place)) {
            Some(place) => Err(Error::setting("judge.form", format!("{text:?}"), format!("a text with {place}"))),
            None => Ok(Self { text, introduction: "" }),
        }
    }

    /// A text that differs between forms.
    pub(super) fn digest(&self) -> String {
        bytes_digest(format!("{}{}", self.introduction, self.text).as_bytes())
    }

    /// The form about an answer. What is filled in is searched neither for places nor for what could pass for the form,
    /// the marks of the model that reads it, or lines of equals signs: those are broken up.
    pub(super) fn filled(&self, answered: &Answered, marks: Vec<String>) -> String {
        let frame = self.frame(marks);
        let context = answered.context.map(|context| frame.guard(context)).map_or(String::new(), |context| {
            if self.introduction.is_empty() { context } else { format!("{}{context}\n\n", self.introduction) }
        });
        let (behavior, answer) = (frame.guard(answered.behavior), frame.guard(answered.answer));
        let mut text = String::new();
        for piece in self.pieces() {
            text.push_str(match piece {
                BEHAVIOR => &behavior,
                CONTEXT => &context,
                GENERATION => &answer,
                literal => literal,
            });
        }
        text
    }

    fn frame(&self, mut marks: Vec<String>) -> Frame {
        marks.push("===".to_string());
        marks.extend(control_texts_in(&self.text));
        let literals = self.pieces().into_iter().filter(|piece| ![BEHAVIOR, CONTEXT, GENERATION].contains(piece));
        Frame::new(marks).with_lines_of(literals.chain([self.introduction]))
    }

    /// Places and what stands between them, in order.
    fn pieces(&self) -> Vec<&str> {
        let mut pieces = Vec::new();
        let mut rest = self.text.as_str();
        loop {
            let places = [BEHAVIOR, CONTEXT, GENERATION].into_iter();
            let Some((at, place)) = places.filter_map(|place| Some((rest.find(place)?, place))).min() else {
                pieces.push(rest);
                return pieces;
            };
            pieces.extend([&rest[..at], &rest[at..at + place.len()]]);
            rest = &rest[at + place.len()..];
        }
    }
}
