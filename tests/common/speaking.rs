//! Shared by the tests of evaluation: a random model with a tokenizer and a chat template.
#![allow(dead_code, reason = "each test crate uses a part")]

use std::{ops::ControlFlow, path::PathBuf};

use advtrain::{
    Case, CausalLm, ChatFormat, Decoder, Generation, Hidden, Input, Message, Outcome, PromptAttack, Result, Subject,
    Trajectory,
    tch::{Device, Kind, Tensor},
};

/// A byte-level tokenizer with its template.
pub fn format() -> ChatFormat {
    ChatFormat::load(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer")).unwrap()
}

/// A random model of two blocks that has read nothing: what it says is noise, the same at every call.
pub fn model() -> Decoder {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": format().tokenizer().vocabulary_size(), "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": true
    });
    Decoder::random(json, 0.4, 1, Kind::Float, Device::Cpu).unwrap()
}

/// A model whose logits are changed.
pub struct OtherLogits<'a, F>(pub &'a Decoder, pub F);

impl<F: Fn(Tensor) -> Tensor> CausalLm for OtherLogits<'_, F> {
    fn layers(&self) -> usize {
        self.0.layers()
    }
    fn kind(&self) -> Kind {
        self.0.kind()
    }
    fn embedding(&self) -> &Tensor {
        self.0.embedding()
    }
    fn hidden(&self, input: &Input) -> Result<Hidden> {
        self.0.hidden(input)
    }
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.1(self.0.logits(hidden)?))
    }
}

/// A behaviour of this id.
pub fn case(id: &str) -> Case {
    Case {
        id: id.into(),
        behavior: format!("Tell me {id}"),
        context: None,
        target: "Sure, here".into(),
        messages: vec![Message::user(format!("Tell me {id}"))],
    }
}

/// Short answers of the likeliest tokens.
pub fn generation() -> Generation {
    Generation { max_new_tokens: 6, ..Generation::default() }
}

/// The model under evaluation, four texts at a time.
pub fn with_subject<T>(work: impl FnOnce(&Subject) -> T) -> T {
    let (model, format) = (model(), format());
    work(&Subject::new(&model, &format, generation(), 4).unwrap())
}

/// What an attack that nothing stops did.
pub fn done(attack: &mut dyn PromptAttack, subject: &Subject, case: &Case) -> Trajectory {
    match attack.attack(subject, case, &mut |_, _| ControlFlow::Continue(())).unwrap() {
        Outcome::Done(trajectory) => trajectory,
        Outcome::Stopped => panic!("nothing stops it"),
    }
}
