//! The Jinja environment that transformers gives a chat template, rebuilt so that the same bytes come out.

use minijinja::{
    Environment, Error, ErrorKind, State, Value, syntax::SyntaxConfig, value::StringInput, value::ValueKind,
};

use super::{
    Date, SpecialTokens,
    message::Message,
    python_json::tojson,
    python_strings::{call_method, trim},
    tags,
};

const NAME: &str = "chat_template";
const OPEN: &str = "advtrain_generation_open";
const CLOSE: &str = "advtrain_generation_close";

/// The function by which templates ask for the date.
const CLOCK: &str = "strftime_now";

/// A template, compiled.
#[derive(Clone, Debug)]
pub(super) struct Engine {
    environment: Environment<'static>,
    special: SpecialTokens,
    pub(super) date: Date,
    pub(super) has_generation_tags: bool,
}

impl Engine {
    pub(super) fn new(source: &str, special: SpecialTokens) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_debug(false);
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(false).build()?;
        environment.set_syntax(syntax);
        minijinja_contrib::add_to_environment(&mut environment);
        // They do something else than in Jinja.
        environment.remove_filter("attr");
        environment.remove_filter("pprint");
        environment.set_unknown_method_callback(call_method);
        environment.add_filter("tojson", tojson);
        environment
            .add_filter("trim", |text: StringInput<'_>, characters: Option<&str>| trim(text.as_str(), characters));
        environment.add_filter(tags::FILTER, mark_generation);
        environment.add_test("iterable", |value: &Value| {
            value.is_undefined() || (!value.is_none() && value.try_iter().is_ok())
        });
        // In Python a string and a mapping have a length and items, which is all that Jinja asks of a sequence.
        environment.add_test("sequence", |value: &Value| {
            matches!(value.kind(), ValueKind::Undefined | ValueKind::Seq | ValueKind::String | ValueKind::Map)
        });
        environment.add_function("raise_exception", raise_exception);
        // Jinja reads every kind of line end as one newline.
        let (source, has_generation_tags) = tags::rewrite(&source.replace("\r\n", "\n").replace('\r', "\n"))?;
        environment.add_template_owned(NAME, source)?;
        let date = Date::today();
        Ok(Self { environment, special, date, has_generation_tags }.with_date(date))
    }

    pub(super) fn with_date(mut self, date: Date) -> Self {
        self.date = date;
        self.environment.add_function(CLOCK, move |format: &str| strftime_now(date, format));
        self
    }

    pub(super) fn uses_clock(&self) -> bool {
        let template = self.environment.get_template(NAME);
        template.is_ok_and(|template| template.undeclared_variables(false).contains(CLOCK))
    }

    /// Renders with `open` and `close` around the text of every generation tag; both may be empty.
    pub(super) fn render(
        &self,
        messages: Value,
        add_generation_prompt: bool,
        open: &str,
        close: &str,
    ) -> Result<String, Error> {
        let mut variables = vec![
            ("messages", messages),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            (OPEN, Value::from(open)),
            (CLOSE, Value::from(close)),
        ];
        variables.extend(self.special.iter().map(|(name, token)| (name, Value::from(token))));
        self.environment.get_template(NAME)?.render(Value::from_pairs(variables))
    }
}

/// Messages as the template sees them.
pub(super) fn messages_value(messages: &[Message]) -> Value {
    let pairs =
        |message: &Message| Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())]);
    messages.iter().map(pairs).collect()
}

fn mark_generation(state: &State, text: &str) -> String {
    let mark = |name| state.lookup(name).unwrap_or_default();
    format!("{}{text}{}", mark(OPEN), mark(CLOSE))
}

/// What a template said when it called `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("the template refuses the conversation: {0}")]
pub(super) struct Refusal(String);

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::from(ErrorKind::InvalidOperation).with_source(Refusal(message.to_string())))
}

fn strftime_now(date: Date, format: &str) -> Result<String, Error> {
    date.strftime(format).map_err(|directive| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {directive} is not a known directive"))
    })
}
