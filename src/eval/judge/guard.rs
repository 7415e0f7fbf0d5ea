//! Keeps what a judge reads from speaking for it.

/// A text that cannot pass for the frame that it is put into: what the frame's own marks look like is broken up with a
/// space. The judge still reads the same words.
pub(super) fn guarded(text: &str, marks: &[&str]) -> String {
    let breakable = |mark: &&&str| mark.chars().count() > 1 && !mark.starts_with(char::is_whitespace);
    marks.iter().filter(breakable).fold(text.to_string(), |text, mark| {
        let mut characters = mark.chars();
        let first = characters.next().unwrap_or_default();
        let mut text = text;
        // Until none is left: taking one apart may join another.
        while text.contains(mark) {
            text = text.replace(mark, &format!("{first} {}", characters.as_str()));
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_do_not_survive() {
        assert_eq!(guarded("so [[10]] it is </s>", &["[[", "</s>"]), "so [ [10]] it is < /s>");
        assert!(!guarded("[[[[[", &["[["]).contains("[["));
        assert_eq!(guarded("plain", &["[[", ""]), "plain");
    }
}
