//! A rendered conversation that knows where the content of each message lies.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use super::{ChatTemplate, Message, marks, python_strings::is_space};
use crate::Result;

/// The text of a conversation and where its parts lie in it, in bytes.
#[derive(Debug)]
pub(super) struct Rendered {
    pub(super) text: String,
    /// The trimmed content of messages, by message, in the order of the text. A message whose content is empty or does not
    /// appear has none; one that appears twice has two.
    contents: Vec<(usize, Range<usize>)>,
    /// What stood in generation tags.
    pub(super) generation: Vec<Range<usize>>,
}

impl Rendered {
    /// Renders as is, and once more with marks around every content, which are taken out again. White space around a
    /// content stays outside its marks, so that a template which trims it gives the same text with them.
    ///
    /// # Errors
    /// If the template refuses the conversation, or does more to a content than trim and place it.
    pub(super) fn new(template: &ChatTemplate, messages: &[Message], add_generation_prompt: bool) -> Result<Self> {
        let (text, generation) = template.render_with_generation(messages, add_generation_prompt)?;
        let Some(marking) = Marking::new(template, messages) else {
            return Err(template.error("the conversation uses up all private-use characters"));
        };
        let marked = template.render(&marking.messages, add_generation_prompt)?;
        let (unmarked, places) = marks::strip(&marked, &marking.all());
        let alters = || template.error("the template alters a message's content, so its place cannot be told");
        if unmarked != text {
            return Err(alters());
        }
        let mut contents = Vec::new();
        let mut opened = None;
        for (mark, at) in places {
            match (marking.contents.get(&mark), opened.take()) {
                (Some((message, true)), None) => opened = Some((*message, at)),
                (Some((message, false)), Some((open, start))) if open == *message => contents.push((open, start..at)),
                _ => return Err(alters()),
            }
        }
        if opened.is_none() { Ok(Self { text, contents, generation }) } else { Err(alters()) }
    }

    /// Where a message's content lies: its first place.
    pub(super) fn content(&self, message: usize) -> Option<Range<usize>> {
        self.contents.iter().find(|(index, _)| *index == message).map(|(_, span)| span.clone())
    }

    /// Where the users' contents lie.
    pub(super) fn user_contents(&self, messages: &[Message]) -> Vec<Range<usize>> {
        let of_user = |(index, _): &&(usize, Range<usize>)| messages.get(*index).is_some_and(Message::is_user);
        self.contents.iter().filter(of_user).map(|(_, span)| span.clone()).collect()
    }

    /// Where the first content behind a place begins; the end of the text if there is none.
    pub(super) fn next_content(&self, from: usize) -> usize {
        self.contents.iter().map(|(_, span)| span.start).filter(|start| *start >= from).min().unwrap_or(self.text.len())
    }
}

/// Messages with marks around their contents.
struct Marking {
    messages: Vec<Message>,
    /// The message of each content mark, and whether it opens.
    contents: HashMap<char, (usize, bool)>,
}

impl Marking {
    /// None if there are too few unused characters.
    fn new(template: &ChatTemplate, messages: &[Message]) -> Option<Self> {
        let mut free = marks::unused_characters(template.texts(messages));
        let mut contents = HashMap::new();
        let mut marked = Vec::with_capacity(messages.len());
        for (index, message) in messages.iter().enumerate() {
            let text = message.content.as_str();
            let core = text.trim_matches(is_space);
            if core.is_empty() {
                // A mark would make it non-empty, which templates ask about.
                marked.push(message.clone());
                continue;
            }
            let (open, close) = (free.next()?, free.next()?);
            contents.insert(open, (index, true));
            contents.insert(close, (index, false));
            let lead = text.len() - text.trim_start_matches(is_space).len();
            let (before, after) = (&text[..lead], &text[lead + core.len()..]);
            marked.push(Message::new(&message.role, format!("{before}{open}{core}{close}{after}")));
        }
        Some(Self { messages: marked, contents })
    }

    fn all(&self) -> HashSet<char> {
        self.contents.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::SpecialTokens;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::from_source(source, &SpecialTokens::default()).unwrap()
    }

    const TRIMS: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }};{% endfor %}";

    #[test]
    fn contents_are_found_where_they_lie() {
        let messages = [Message::user("  a [user]a; "), Message::assistant(""), Message::user("a\u{F0000}")];
        let rendered = Rendered::new(&template(TRIMS), &messages, false).unwrap();
        assert_eq!(rendered.text, "[user]a [user]a;;[assistant];[user]a\u{F0000};");
        assert_eq!(rendered.content(0), Some(6..16));
        assert_eq!(rendered.content(1), None);
        assert_eq!(rendered.user_contents(&messages), [6..16, 35..40]);
        assert_eq!(rendered.next_content(16), 35);
        assert_eq!(rendered.next_content(36), rendered.text.len());
    }

    #[test]
    fn spaces_that_a_template_keeps_lie_outside() {
        let rendered =
            Rendered::new(&template("{{ messages[0].content }}|"), &[Message::user("\n a ")], false).unwrap();
        assert_eq!((rendered.text.as_str(), rendered.content(0)), ("\n a |", Some(2..3)));
    }

    #[test]
    fn a_template_that_alters_contents_is_an_error() {
        for source in [
            "{{ messages[0].content[:4] }}",
            "{{ messages[0].content | length }}",
            "{{ messages[0].content.split('b')[1] }}",
        ] {
            let error = Rendered::new(&template(source), &[Message::user("abcdef")], false).unwrap_err().to_string();
            assert!(error.contains("alters a message's content"), "{error}");
        }
    }

    #[test]
    fn generation_tags_and_contents_nest() {
        let source = "{% for m in messages %}<{% generation %}({{ m.content }}){% endgeneration %}>{% endfor %}";
        let rendered = Rendered::new(&template(source), &[Message::user("a"), Message::user("b")], false).unwrap();
        assert_eq!(rendered.text, "<(a)><(b)>");
        assert_eq!(rendered.generation, [1..4, 6..9]);
        assert_eq!(rendered.content(1), Some(7..8));
    }
}
