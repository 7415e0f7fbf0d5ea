use super::super::{SpecialTokens, TemplatePreset, test_tokenizers::byte_level, test_tokenizers::sentence_piece};
use super::*;
use TokenKind::{Target, Template, User};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const CHATML_TOKENS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

fn format(tokenizer: Tokenizer, source: &str) -> ChatFormat {
    ChatFormat::new(tokenizer, ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap()).unwrap()
}

fn chatml() -> ChatFormat {
    format(byte_level(&[("Ġ", "y"), ("Ċ", "Ċ")], &CHATML_TOKENS), CHATML)
}

/// The tokens as text, with `[` `]` around users' text and `{` `}` around targets.
fn shown(format: &ChatFormat, tokens: &Tokens) -> String {
    let mut text = String::new();
    let mut before = Template;
    for (id, kind) in tokens.ids().iter().zip(tokens.kinds()) {
        if *kind != before {
            text.push_str(match before {
                User => "]",
                Target => "}",
                Template => "",
            });
            text.push_str(match kind {
                User => "[",
                Target => "{",
                Template => "",
            });
        }
        before = *kind;
        text.push_str(&format.tokenizer().decode(&[*id], false).unwrap());
    }
    text.push_str(match before {
        User => "]",
        Target => "}",
        Template => "",
    });
    text
}

fn turns() -> Vec<Message> {
    vec![
        Message::system("S"),
        Message::user("assistant"),
        Message::assistant("one"),
        Message::user(" u "),
        Message::assistant("two"),
        Message::user("bye"),
    ]
}

#[test]
fn a_prompt_knows_the_users_text() {
    let format = chatml();
    let prompt = format.prompt(&turns()[..2]).unwrap();
    let expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n[assistant]<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(shown(&format, &prompt), expected);
}

#[test]
fn an_answer_ends_with_its_end_of_turn_token() {
    let format = chatml();
    let encoded = format.answer(&turns()[..2], "one\n").unwrap();
    assert_eq!(encoded.prompt, format.prompt(&turns()[..2]).unwrap());
    assert_eq!(shown(&format, &encoded.continuation), "{one\n<|im_end|>}");
    assert!(!encoded.boundary_merged);
    assert_eq!(format.end_of_turn(), format.tokenizer().id_of("<|im_end|>"));
    assert_eq!(format.end_ids(), [format.end_of_turn().unwrap()]);
}

#[test]
fn a_chat_has_every_answer_or_the_last_one() {
    let format = chatml();
    let all = format.chat(&turns(), Turns::All).unwrap();
    assert_eq!(all.prompt, format.prompt(&turns()[..2]).unwrap());
    let expected = "{one<|im_end|>}\n<|im_start|>user\n [u] <|im_end|>\n<|im_start|>assistant\n{two<|im_end|>}";
    assert_eq!(shown(&format, &all.continuation), expected);
    let last = format.chat(&turns(), Turns::Last).unwrap();
    assert_eq!(last.prompt, format.prompt(&turns()[..4]).unwrap());
    assert_eq!(shown(&format, &last.continuation), "{two<|im_end|>}");
}

#[test]
fn generation_tags_say_what_the_targets_are() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
        {% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let format = format(byte_level(&[], &CHATML_TOKENS), source);
    let chat = format.chat(&turns()[..5], Turns::All).unwrap();
    let expected = "{one}<|im_end|>\n<|im_start|>user\n [u] <|im_end|>\n<|im_start|>assistant\n{two}";
    assert_eq!(shown(&format, &chat.continuation), expected);
    let last = format.chat(&turns()[..5], Turns::Last).unwrap();
    assert_eq!(shown(&format, &last.continuation), "{two}");
    assert_eq!(shown(&format, &format.answer(&turns()[..2], "one").unwrap().continuation), "{one<|im_end|>}");
}

/// Phi-3's own template ends a conversation, but not a turn, with an end-of-sequence token.
#[test]
fn the_end_of_a_conversation_is_not_the_end_of_a_turn() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '</s>' }}{% endif %}";
    let format = format(byte_level(&[], &["<|im_start|>", "<|im_end|>", "</s>"]), source);
    let chat = format.chat(&turns(), Turns::All).unwrap();
    let expected = "{one<|im_end|>}\n<|im_start|>user\n [u] <|im_end|>\n<|im_start|>assistant\n{two<|im_end|>}";
    assert_eq!(shown(&format, &chat.continuation), expected);
}

#[test]
fn a_template_without_end_tokens_has_whole_turns() {
    let source = "{% for m in messages %}{{ ('A: ' if m.role == 'assistant' else 'U: ') + m.content | trim + '\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ 'A: ' }}{% endif %}";
    let format = format(byte_level(&[], &[]), source);
    assert_eq!(format.end_of_turn(), None);
    let chat = format.chat(&turns()[1..5], Turns::All).unwrap();
    assert_eq!(shown(&format, &chat.prompt), "U: [assistant]\nA: ");
    assert_eq!(shown(&format, &chat.continuation), "{one\n}U: [u]\nA: {two\n}");
}

/// The next turn begins with a special token, which is not the end of this one.
#[test]
fn the_start_of_the_next_turn_is_not_an_end() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let format = format(byte_level(&[], &["<|im_start|>"]), source);
    let chat = format.chat(&turns()[1..5], Turns::All).unwrap();
    assert_eq!(shown(&format, &chat.continuation), "{one\n}<|im_start|>user\n [u] \n<|im_start|>assistant\n{two\n}");
}

#[test]
fn a_generation_prompt_that_is_no_prefix_falls_back_to_the_text() {
    let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant<think>' }}{% endif %}";
    let format = format(byte_level(&[], &CHATML_TOKENS), source);
    let encoded = format.answer(&[Message::user("a")], " b").unwrap();
    assert_eq!(shown(&format, &encoded.continuation), "{b<|im_end|>}");
    assert!(format.warned.load(Ordering::Relaxed));
}

/// Mistral's third template prints the system's text at the last user's turn, and so not where an answer follows.
#[test]
fn a_prompt_that_changes_with_the_answer_is_refused() {
    let source = "{% for m in messages %}{% if m.role == 'user' %}[INST] \
        {%- if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}\
        {{- m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}";
    let format = format(byte_level(&[], &["</s>"]), source);
    let prompt = [Message::system("S"), Message::user("a")];
    assert_eq!(shown(&format, &format.prompt(&prompt).unwrap()), "[INST]S\n\n[a][/INST]");
    let error = format.answer(&prompt, "b").unwrap_err().to_string();
    assert!(error.contains("before an answer are rendered otherwise"), "{error}");
    assert_eq!(shown(&format, &format.answer(&prompt[1..], "b").unwrap().continuation), "{ b</s>}");
}

#[test]
fn a_merge_across_the_border_keeps_the_prompt_as_at_inference() {
    let format = format(
        byte_level(&[("Ġ", "y")], &["</s>"]),
        "{{ 'Q' + messages[0].content + 'A: ' }}\
        {%- for m in messages[1:] %}{{ m.content + '</s>' }}{% endfor %}",
    );
    let encoded = format.answer(&[Message::user("x")], "y y").unwrap();
    assert!(encoded.boundary_merged);
    assert_eq!(encoded.prompt, format.prompt(&[Message::user("x")]).unwrap());
    assert_eq!(shown(&format, &encoded.prompt), "Q[x]A: ");
    let token = |text: &str| format.tokenizer().id_of(text).unwrap();
    assert_eq!(encoded.continuation.ids(), [token("y"), token("Ġy"), token("</s>")]);
    assert!(!format.answer(&[Message::user("x")], "z").unwrap().boundary_merged);
}

/// The paper's Mistral prompt ends with a space; the answer must not get a second one from the tokenizer.
#[test]
fn no_space_is_put_before_an_answer() {
    let tokenizer = sentence_piece(&[("▁", "y")], &["<s>", "</s>"]);
    let format = ChatFormat::new(tokenizer, ChatTemplate::preset(TemplatePreset::Mistral).unwrap()).unwrap();
    let encoded = format.answer(&[Message::user("x")], "y y").unwrap();
    assert!(encoded.boundary_merged);
    let token = |text: &str| format.tokenizer().id_of(text).unwrap();
    assert_eq!(encoded.prompt.ids().last(), Some(&token("▁")));
    assert_eq!(encoded.continuation.ids(), [token("y"), token("▁y"), token("▁"), token("</s>")]);
    assert_eq!(encoded.continuation.targets(), 4);
}

#[test]
fn presets_end_targets_with_their_tokens() {
    let cases = [
        (TemplatePreset::Gemma, vec!["<bos>", "<start_of_turn>", "<end_of_turn>"], "{b<end_of_turn>}"),
        (TemplatePreset::Zephyr, vec!["<s>", "</s>"], "{b</s>}"),
        (TemplatePreset::Mistral, vec!["<s>", "</s>"], "{b </s>}"),
        (TemplatePreset::Phi3, vec!["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], "{b<|end|>}"),
    ];
    for (preset, special, expected) in cases {
        let format = ChatFormat::new(byte_level(&[], &special), ChatTemplate::preset(preset).unwrap()).unwrap();
        let messages = [Message::user("a"), Message::assistant("b"), Message::user("c"), Message::assistant("b")];
        let encoded = format.chat(&messages, Turns::Last).unwrap();
        assert_eq!(shown(&format, &encoded.continuation), expected);
        assert!(shown(&format, &encoded.prompt).contains("[a]"));
        let all = format.chat(&messages, Turns::All).unwrap();
        assert_eq!(shown(&format, &all.continuation).matches(expected).count(), 2, "{preset:?}");
        assert_eq!(all.prompt.ids()[0], format.tokenizer().id_of(special[0]).unwrap());
    }
}

#[test]
fn tokens_of_halves_of_characters_belong_to_the_user() {
    let format = chatml();
    let prompt = format.prompt(&[Message::user("é😀")]).unwrap();
    assert_eq!(prompt.kinds().iter().filter(|kind| **kind == User).count(), 6);
}

#[test]
fn conversations_without_a_prompt_or_an_answer_are_errors() {
    let format = chatml();
    for (messages, expected) in [
        (vec![], "expected a message of the role assistant, found no message"),
        (vec![Message::user("a")], "expected a message of the role assistant, found user"),
        (vec![Message::assistant("a"), Message::user("b")], "a message before the first answer, found assistant, user"),
    ] {
        let message = format.chat(&messages, Turns::All).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
