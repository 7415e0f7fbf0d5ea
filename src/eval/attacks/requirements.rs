//! What attacks ask of a case before they begin.

use crate::{Case, Error, Result, Subject, error::Context};

/// The plain request can be asked, and answered within the model's context.
///
/// # Errors
/// Names the case, with its length or why it cannot be rendered.
pub(super) fn can_be_asked(subject: &Subject, case: &Case) -> Result<()> {
    subject.check(&case.messages).context(|| format!("asking the plain request of {}", case.id))
}

/// The case has a last message that can be changed: the user's.
///
/// # Errors
/// Names the case, and what is last instead.
pub(super) fn ends_with_a_request(case: &Case) -> Result<()> {
    let found = match case.messages.last() {
        Some(last) if !last.is_assistant() => return Ok(()),
        Some(last) => format!("one of the role {}", last.role),
        None => "no message".to_string(),
    };
    Err(Error::example(
        &case.id,
        format!("its conversation must end with a message of the user's, and ends with {found}"),
    ))
}

/// The case has a target.
///
/// # Errors
/// Names the case.
pub(super) fn has_a_target(case: &Case) -> Result<()> {
    if case.target.trim().is_empty() {
        let message = format!("target = {:?}: must be a text, since the attack is towards it", case.target);
        return Err(Error::example(&case.id, message));
    }
    Ok(())
}
