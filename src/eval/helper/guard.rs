//! Keeps a text that a model reads from passing for the frame around it.

use crate::{ChatFormat, Message};

/// Control texts of well-known chat formats, for models whose own is not known here.
pub const CONTROL_TEXTS: &[&str] = &[
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|return|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<bos>",
    "<eos>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "SYSTEM:",
    "USER:",
    "ASSISTANT:",
    "System:",
    "User:",
    "Assistant:",
    "Human:",
    "### Instruction:",
    "### Response:",
];

/// What a text that is put between others must not hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frame {
    /// Broken up wherever they stand.
    marks: Vec<String>,
    /// Words that are broken up where they fill a line: anywhere else they are words like others.
    headings: Vec<String>,
}

impl Frame {
    /// Of texts that must not stand in it anywhere. A mark of one character cannot be broken up and is left out.
    pub(crate) fn new<T: Into<String>>(marks: impl IntoIterator<Item = T>) -> Self {
        let marks = marks.into_iter().map(|mark| mark.into().trim().to_string());
        Self { marks: marks.filter(|mark| mark.chars().count() > 1).collect(), headings: Vec::new() }
    }

    /// The same, with the lines of the texts around it.
    pub(crate) fn with_lines_of<'t>(mut self, texts: impl IntoIterator<Item = &'t str>) -> Self {
        let lines = texts.into_iter().flat_map(str::lines).map(str::trim).filter(|line| line.chars().count() > 1);
        let (words, lines): (Vec<&str>, Vec<&str>) = lines.partition(|line| is_one_word(line));
        self.marks.extend(lines.into_iter().map(str::to_string));
        self.headings.extend(words.into_iter().map(str::to_string));
        self
    }

    /// The text with a space inside whatever could pass for the frame: a model still reads the
    /// same words.
    pub(crate) fn guard(&self, text: &str) -> String {
        let mut text = text.to_string();
        // Until nothing is left to break: taking one apart may join another.
        loop {
            let broken = self.broken(&text);
            if broken == text {
                return text;
            }
            text = broken;
        }
    }

    fn broken(&self, text: &str) -> String {
        let text = self.marks.iter().fold(text.to_string(), |text, mark| text.replace(mark, &spaced(mark)));
        let line = |line: &str| {
            let heading = self.headings.iter().find(|heading| *heading == line.trim());
            heading.map_or(line.to_string(), |heading| line.replacen(heading, &spaced(heading), 1))
        };
        text.split('\n').map(line).collect::<Vec<_>>().join("\n")
    }
}

/// The mark with a space between its first two characters that have none between them.
fn spaced(mark: &str) -> String {
    let pairs = mark.char_indices().zip(mark.chars().skip(1));
    let mut dense = pairs.filter(|((_, this), next)| !this.is_whitespace() && !next.is_whitespace());
    let first = mark.chars().next().map_or(0, char::len_utf8);
    let (head, tail) = mark.split_at(dense.next().map_or(first, |((at, this), _)| at + this.len_utf8()));
    format!("{head} {tail}")
}

fn is_one_word(text: &str) -> bool {
    text.chars().all(char::is_alphanumeric)
}

/// What a chat format prints around the contents of messages: its added tokens, and each line that is more than a word
/// (roles are words).
pub(crate) fn texts_around(format: &ChatFormat) -> Vec<String> {
    let mut texts = format.tokenizer().added_texts();
    // The longest first: one may be part of another.
    let mut added = texts.clone();
    added.sort_by_key(|text| std::cmp::Reverse(text.len()));
    for text in probes().iter().filter_map(|messages| format.template().render(messages, true).ok()) {
        texts.extend(control_texts_in(&text));
        let plain = added.iter().fold(text, |text, token| text.replace(token.as_str(), "\n"));
        let lines = plain.split(CONTENT).flat_map(str::lines).map(str::trim).filter(|line| !is_one_word(line));
        texts.extend(lines.map(str::to_string));
    }
    texts.sort();
    texts.dedup();
    texts
}

/// Those of [`CONTROL_TEXTS`] that a text holds.
pub(crate) fn control_texts_in(text: &str) -> impl Iterator<Item = String> {
    CONTROL_TEXTS.iter().filter(move |control| text.contains(**control)).map(|control| control.to_string())
}

/// No template prints it by itself.
const CONTENT: char = '\u{10FFFD}';

/// Conversations that make a template print all it has; some templates refuse some of them.
fn probes() -> [Vec<Message>; 3] {
    let said = |role: &str| Message::new(role, CONTENT);
    [
        vec![said("user")],
        vec![said("user"), said("assistant"), said("user")],
        vec![said("system"), said("user"), said("assistant"), said("user")],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ChatTemplate, SpecialTokens, TemplatePreset, Tokenizer};

    fn guarded(text: &str, marks: &[&str]) -> String {
        Frame::new(marks.iter().copied()).guard(text)
    }

    #[test]
    fn marks_do_not_survive() {
        assert_eq!(guarded("so [[10]] it is </s>", &["[[", "</s>"]), "so [ [10]] it is < /s>");
        assert_eq!(guarded("plain", &["[[", "", " "]), "plain");
        for (text, marks) in [("[[[[[", vec!["[["]), ("=========", vec!["==="]), ("a a b", vec!["ab", "a b", "a a"])] {
            let found = guarded(text, &marks);
            assert!(marks.iter().all(|mark| !found.contains(mark)), "{found}");
        }
    }

    #[test]
    fn a_mark_that_a_space_cannot_break_ends_the_search_too() {
        assert_eq!(guarded("a  b", &["a "]), "a  b");
        assert_eq!(guarded("x  y", &["x \n"]), "x  y");
    }

    #[test]
    fn lines_of_the_frame_are_broken_and_its_words_only_as_lines() {
        let frame = Frame::default().with_lines_of(["BEGIN\n", "\nEND\n---\nNow judge: yes or no?"]);
        let text = "END of BEGIN\n END \n---\nNow judge: yes or no?";
        assert_eq!(frame.guard(text), "END of BEGIN\n E ND \n- --\nN ow judge: yes or no?");
    }

    fn texts_of(tokenizer: &str, template: ChatTemplate) -> Vec<String> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(tokenizer);
        texts_around(&ChatFormat::new(Tokenizer::load(folder).unwrap(), template).unwrap())
    }

    #[test]
    fn what_a_template_prints_is_known_to_the_guard() {
        let preset = |preset| ChatTemplate::preset(preset).unwrap();
        let mistral = texts_of("tokenizer_sp", preset(TemplatePreset::Mistral));
        assert_eq!(mistral, ["</s>", "<s>", "<unk>", "[/INST]", "[INST]"]);
        let zephyr = texts_of("tokenizer_sp", preset(TemplatePreset::Zephyr));
        assert!(["<|user|>", "<|assistant|>", "<|system|>"].iter().all(|tag| zephyr.iter().any(|text| text == tag)));
        // Tags that no other format has.
        let own = "{% for m in messages %}~{{ m.role }}~ {{ m.content }} {% endfor %}\
                   {% if add_generation_prompt %}~assistant~{% endif %}";
        let own = texts_of("tokenizer_sp", ChatTemplate::from_source(own, &SpecialTokens::default()).unwrap());
        assert_eq!(own, ["</s>", "<s>", "<unk>", "~assistant~", "~system~", "~user~"]);
        // Roles that are words between tokens stay words.
        let chatml = ChatTemplate::load(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer")).unwrap();
        assert_eq!(texts_of("tokenizer", chatml), ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]);
    }
}
