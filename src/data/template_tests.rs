use std::fs;

use serde_json::json;

use super::super::{ChatFormat, test_tokenizers::byte_level};
use super::*;

#[derive(Deserialize)]
struct Record {
    name: String,
    template: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    messages: Value,
    add_generation_prompt: bool,
    rendered: Value,
    generation_spans: Option<Vec<(usize, usize)>>,
}

impl Record {
    fn compiled(&self) -> ChatTemplate {
        let tokens = [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)];
        let special =
            SpecialTokens::new(tokens.iter().filter_map(|(name, token)| Some((*name, token.as_ref()?.clone()))));
        ChatTemplate::from_source(&self.template, &special).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// Messages with more than a role and a text are for templates of other kinds of models, and go to the engine alone.
    fn render(&self) -> Result<(String, Vec<(usize, usize)>)> {
        let template = self.compiled();
        let plain = serde_json::from_value::<Vec<Message>>(self.messages.clone())
            .ok()
            .filter(|messages| serde_json::to_value(messages).unwrap() == self.messages);
        let Some(messages) = plain else {
            let messages = minijinja::value::Serde(&self.messages).into();
            let text = template.engine.render(messages, self.add_generation_prompt, "", "");
            return Ok((text.map_err(|error| engine_error(&template.origin, &error))?, Vec::new()));
        };
        let (text, spans) = template.render_with_generation(&messages, self.add_generation_prompt)?;
        assert_eq!(template.render(&messages, self.add_generation_prompt)?, text, "{}", self.name);
        let characters = |bytes: usize| text[..bytes].chars().count();
        let spans = spans.iter().map(|span| (characters(span.start), characters(span.end))).collect();
        Ok((text, spans))
    }
}

/// The fixtures are rendered by transformers itself.
#[test]
fn every_fixture_renders_byte_for_byte() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates.json");
    let records: Vec<Record> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    assert!(records.len() > 40);
    let mut wrong = Vec::new();
    for record in records {
        let name = &record.name;
        match (record.rendered.as_str(), record.render()) {
            (None, Err(error)) => {
                let raised = record.rendered["error"].as_str().unwrap();
                assert!(error.to_string().ends_with(&format!("refuses the conversation: {raised}")), "{name}: {error}");
            }
            (Some(expected), Ok((text, spans))) => {
                if text != expected {
                    wrong.push(format!("{name}:\n{text}\n--- expected\n{expected}"));
                }
                assert_eq!(record.compiled().has_generation_tags(), record.generation_spans.is_some(), "{name}");
                assert_eq!(spans, record.generation_spans.unwrap_or_default(), "{name}");
            }
            (expected, found) => wrong.push(format!("{name}: {found:?}\n--- expected {expected:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n=====\n"));
}

fn pair() -> [Message; 2] {
    [Message::user("X"), Message::assistant("Y")]
}

/// The strings of the paper, with their placeholders filled in by hand.
#[test]
fn presets_print_the_papers_strings() {
    let cases = [
        (TemplatePreset::Gemma, "<bos><start_of_turn>user\nX<end_of_turn>\n<start_of_turn>model\n", "Y<end_of_turn>\n"),
        (TemplatePreset::Zephyr, "<s><|user|>\nX</s>\n<|assistant|>\n", "Y</s>"),
        (TemplatePreset::Mistral, "<s>[INST] X [/INST] ", "Y </s>"),
        (
            TemplatePreset::Phi3,
            "<s><|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\nX<|end|>\n<|assistant|>\n",
            "Y<|end|>\n",
        ),
    ];
    for (preset, prompt, answer) in cases {
        let template = ChatTemplate::preset(preset).unwrap();
        let [user, _] = pair();
        assert_eq!(template.render(&[user], true).unwrap(), prompt);
        assert_eq!(template.render(&pair(), false).unwrap(), format!("{prompt}{answer}"));
        let unknown = template.render(&[Message::new("tool", "x")], false).unwrap_err().to_string();
        assert!(unknown.contains("preset") && unknown.contains("tool"), "{unknown}");
    }
}

#[test]
fn presets_go_on_for_several_turns() {
    let turns = [Message::user("A"), Message::assistant("B"), Message::user("C")];
    let render = |preset| ChatTemplate::preset(preset).unwrap().render(&turns, true).unwrap();
    assert_eq!(
        render(TemplatePreset::Zephyr),
        "<s><|user|>\nA</s>\n<|assistant|>\nB</s>\n<|user|>\nC</s>\n<|assistant|>\n"
    );
    assert_eq!(render(TemplatePreset::Mistral), "<s>[INST] A [/INST] B </s>[INST] C [/INST] ");
    let led = [Message::system("S"), Message::user("A")];
    let phi = ChatTemplate::preset(TemplatePreset::Phi3).unwrap();
    assert_eq!(phi.render(&led, false).unwrap(), "<s><|system|>\nS<|end|>\n<|user|>\nA<|end|>\n");
    assert_eq!(serde_json::to_value(TemplatePreset::Phi3).unwrap(), json!("phi-3"));
}

fn folder(files: &[(&str, String)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

#[test]
fn the_template_file_wins_over_the_config() {
    let config = json!({"bos_token": "<s>", "chat_template": "config"}).to_string();
    let both = folder(&[("tokenizer_config.json", config.clone()), (TEMPLATE_FILE, "{{ bos_token }}file\n".into())]);
    assert_eq!(ChatTemplate::load(both.path()).unwrap().render(&[], false).unwrap(), "<s>file");
    let one = folder(&[("tokenizer_config.json", config)]);
    assert_eq!(ChatTemplate::load(one.path()).unwrap().render(&[], false).unwrap(), "config");
}

#[test]
fn a_list_of_templates_has_a_default() {
    let entries = |name: &str| {
        let list = json!([{"name": "tool_use", "template": "a"}, {"name": name, "template": "b"}]);
        folder(&[("tokenizer_config.json", json!({"chat_template": list}).to_string())])
    };
    let found = entries("default");
    assert_eq!(ChatTemplate::load(found.path()).unwrap().source(), "b");
    let message = ChatTemplate::load(entries("rag").path()).unwrap_err().to_string();
    assert!(message.ends_with("chat_template: no entry is named default; found tool_use, rag"), "{message}");
}

#[test]
fn a_missing_or_broken_template_is_an_error() {
    let message = ChatTemplate::load(folder(&[]).path()).unwrap_err().to_string();
    assert!(message.contains("no chat_template here and no chat_template.jinja beside it"), "{message}");
    let broken = folder(&[(TEMPLATE_FILE, "a\n{% if %}".into())]);
    let message = ChatTemplate::load(broken.path()).unwrap_err().to_string();
    assert!(message.contains("chat_template.jinja: line 2: "), "{message}");
    let refusing = "{{ raise_exception('no such role') }}";
    let template = ChatTemplate::from_source(refusing, &SpecialTokens::default()).unwrap();
    let message = template.render(&pair(), false).unwrap_err().to_string();
    assert!(message.contains("the template refuses the conversation: no such role"), "{message}");
}

#[test]
fn generation_spans_skip_characters_that_are_taken() {
    let source = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    let (text, spans) = template.render_with_generation(&[Message::user("a\u{F0000}")], false).unwrap();
    assert_eq!(text, "<a\u{F0000}>");
    assert_eq!((spans.len(), spans[0].clone()), (1, 1..6));
}

/// As Llama 3.2's template asks for it. The expected texts are what Python's datetime prints for midnight of those days.
#[test]
fn a_date_is_fixed() {
    let source = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y, %H:%M') %}{% endif %}{{ d }}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    assert!(template.uses_clock());
    let render = |date: &str| template.clone().with_date(date.parse().unwrap()).render(&[], false).unwrap();
    assert_eq!(render("2026-11-25"), "25 Nov 2026, 00:00");
    assert_eq!(render("2026-11-26"), "26 Nov 2026, 00:00");
    let kept = template.date().to_string();
    assert_eq!(template.render(&[], false).unwrap(), render(&kept));
    let tokenizer = byte_level(&[], &["</s>"]);
    let source = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    let format = ChatFormat::new(tokenizer, template).unwrap().with_date("1999-12-31".parse().unwrap());
    let prompt = format.prompt(&[Message::user("a")]).unwrap();
    assert_eq!(format.tokenizer().decode(prompt.ids(), false).unwrap(), "1999a</s>");
    assert_eq!(format.template().date().to_string(), "1999-12-31");
    for source in ["{{ messages[0].content }}", "strftime_now('%d')", "{# strftime_now('%d') #}"] {
        assert!(!ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap().uses_clock(), "{source}");
    }
}

/// What a tag sets stays inside it, as in transformers, where the tag is a block of its own.
#[test]
fn a_generation_tag_is_a_scope() {
    let source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}";
    let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "21");
}

#[test]
fn the_hash_is_of_the_source() {
    let template = ChatTemplate::from_source("abc", &SpecialTokens::default()).unwrap();
    assert_eq!(template.hash(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    let folder = tempfile::tempdir().unwrap();
    template.save(folder.path()).unwrap();
    assert_eq!(ChatTemplate::load(folder.path()).unwrap().hash(), template.hash());
}

/// Each expected text is what jinja2 prints with the settings of transformers.
#[test]
fn what_the_engine_does_otherwise_is_put_right() {
    let cases = [
        ("{% raw %}\n {{ x }}\n{% endraw %}\ny\n", "\n {{ x }}\ny"),
        ("{%- raw -%}\n {{ x }}{% endraw %}", "{{ x }}"),
        ("{{ none is iterable }}{{ 3 is iterable }}{{ '' is iterable }}{{ u is iterable }}", "FalseFalseTrueTrue"),
        ("{{ '' is sequence }}{{ {} is sequence }}{{ 3 is sequence }}", "TrueTrueFalse"),
        ("a\r\n{% if true %}\r\nb{% endif %}\r\n", "a\nb"),
        ("{{ '\\x1c a ' | trim }}", "a"),
    ];
    for (source, expected) in cases {
        let template = ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap();
        assert_eq!(template.render(&[], false).unwrap(), expected, "{source}");
    }
}

/// jinja2 renders each of these; docs/templates.md lists them. An author learns what is missing from the message.
#[test]
fn what_the_engine_lacks_is_named() {
    let named = [
        ("{{ 'ab' | center(10) }}", "filter center is unknown"),
        ("{{ 'a b' | wordwrap(4) }}", "filter wordwrap is unknown"),
        ("{{ [1] | pprint }}", "filter pprint is unknown"),
        ("{{ {} | attr('a') }}", "filter attr is unknown"),
        ("{{ 'ab'.center(10) }}", "string has no method named center"),
        ("{{ '7'.zfill(3) }}", "string has no method named zfill"),
        ("{{ [1].index(1) }}", "sequence has no method named index"),
        ("{{ {}.copy() }}", "map has no method named copy"),
        ("{{ '%s' % 'x' }}", "tried to use % operator on unsupported types string and string"),
        ("{{ 'x' | int }}", "invalid float literal"),
        ("{{ 'a b c' | truncate(3) }}", "too many arguments"),
        ("{{ 'abc'.startswith('b', 1) }}", "too many arguments"),
        ("{{ messages is callable }}", "test callable is unknown"),
        ("{{ cycler('a', 'b').next() }}", "not iterable"),
        ("{{ lipsum() }}", "lipsum is unknown"),
        ("{{ strftime_now('%c') }}", "%c is not a known directive"),
        ("{% macro m() %}{{ varargs }}{% endmacro %}{{ m(1) }}", "too many arguments"),
        ("a {{ '\\U0001F600' }}", "the escape \\U in {{ '\\U0001F600' }} is not supported"),
        ("{% set x = \"\\N{BULLET}\" %}", "the escape \\N"),
    ];
    for (source, expected) in named {
        let template = ChatTemplate::from_source(source, &SpecialTokens::default());
        let message = template.and_then(|template| template.render(&pair(), false)).unwrap_err().to_string();
        assert!(message.contains(expected), "{source}: {message}");
    }
    let plain = "\\U {# '\\U' #}{% raw %}{{ '\\N' }}{% endraw %}{{ '\\\\U' }}";
    let template = ChatTemplate::from_source(plain, &SpecialTokens::default()).unwrap();
    assert_eq!(template.render(&[], false).unwrap(), "\\U {{ '\\N' }}\\U");
}
