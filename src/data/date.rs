//! The date that templates print which ask for today's.

use std::{
    fmt::{self, Write},
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

const SECONDS_OF_A_DAY: i64 = 86_400;

/// A day of the calendar, written `2026-11-25`; years have four digits.
///
/// ```
/// use advtrain::Date;
///
/// let date: Date = "2026-11-25".parse()?;
/// assert_eq!(date.to_string(), "2026-11-25");
/// # Ok::<(), advtrain::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Date {
    /// Days since 1 January 1970.
    days: i64,
}

impl Date {
    /// Today in UTC.
    pub fn today() -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64);
        Self { days: seconds.div_euclid(SECONDS_OF_A_DAY) }
    }

    /// Python's `strftime` for midnight of this day; see [`strftime`].
    pub(super) fn strftime(self, format: &str) -> Result<String, String> {
        strftime(format, self.days * SECONDS_OF_A_DAY)
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Calendar { year, month, day, .. } = Calendar::new(self.days * SECONDS_OF_A_DAY);
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

impl FromStr for Date {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |part: &str| part.parse::<i64>().ok();
        let date = || match *text.split('-').collect::<Vec<_>>() {
            [year, month, day] if text.len() == 10 => {
                Some(Self { days: days_since_1970(number(year)?, number(month)?, number(day)?) })
            }
            _ => None,
        };
        let wrong = || Error::setting("date", format!("{text:?}"), "a day of the calendar, written as 2026-11-25");
        // What is no day of the calendar, or written in another way, does not come back as it was.
        date().filter(|date| date.to_string() == text).ok_or_else(wrong)
    }
}

impl TryFrom<String> for Date {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Date> for String {
    fn from(date: Date) -> Self {
        date.to_string()
    }
}

/// The inverse of [`Calendar::new`] for days of the calendar; some number for others.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month > 2 { year } else { year - 1 };
    let month_from_march = (month + 9).rem_euclid(12);
    let day_from_march = (153 * month_from_march + 2) / 5 + day - 1;
    365 * year + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_from_march - 719_468
}

/// Python's `strftime` in UTC and English, for the directives that make sense without a locale; the error is the directive
/// that is not among them.
fn strftime(format: &str, seconds: i64) -> Result<String, String> {
    let time = Calendar::new(seconds);
    let mut output = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            output.push(character);
            continue;
        }
        let directive = characters.next();
        let unpadded = directive == Some('-');
        let directive = if unpadded { characters.next() } else { directive };
        let Some(text) = directive.and_then(|directive| time.field(directive, unpadded)) else {
            return Err(format!("%{}", directive.map(String::from).unwrap_or_default()));
        };
        output.push_str(&text);
    }
    Ok(output)
}

struct Calendar {
    year: i64,
    month: usize,
    day: i64,
    day_of_year: i64,
    weekday: usize,
    second_of_day: i64,
}

impl Calendar {
    /// The civil date from a count of days, counted from 1 March of year 0 so that leap days end a year.
    fn new(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_OF_A_DAY);
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_from_march + 2) / 153;
        let day = day_from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let day_of_year = if month > 2 { day_from_march + 60 + i64::from(leap) } else { day_from_march - 306 + 1 };
        Self {
            year,
            month: month as usize,
            day,
            day_of_year,
            weekday: (days + 4).rem_euclid(7) as usize,
            second_of_day: seconds.rem_euclid(SECONDS_OF_A_DAY),
        }
    }

    fn field(&self, directive: char, unpadded: bool) -> Option<String> {
        let hour = self.second_of_day / 3_600;
        let (value, width) = match directive {
            'Y' => (self.year, 4),
            'y' => (self.year.rem_euclid(100), 2),
            'm' => (self.month as i64, 2),
            'd' => (self.day, 2),
            'j' => (self.day_of_year, 3),
            'H' => (hour, 2),
            'I' => ((hour + 11) % 12 + 1, 2),
            'M' => (self.second_of_day / 60 % 60, 2),
            'S' => (self.second_of_day % 60, 2),
            'B' => return MONTHS.get(self.month - 1).map(|name| name.to_string()),
            'b' => return MONTHS.get(self.month - 1).map(|name| name[..3].to_string()),
            'A' => return DAYS.get(self.weekday).map(|name| name.to_string()),
            'a' => return DAYS.get(self.weekday).map(|name| name[..3].to_string()),
            'p' => return Some(if hour < 12 { "AM" } else { "PM" }.to_string()),
            '%' => return Some("%".to_string()),
            _ => return None,
        };
        let mut text = String::new();
        let width = if unpadded { 0 } else { width };
        // Writing to a String cannot fail.
        let _ = write!(text, "{value:0width$}");
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each expected text is what Python's datetime prints for the same second in UTC.
    #[test]
    fn dates_are_pythons() {
        let format = "%d %b %Y %B %m/%y %A %a %j %H:%M:%S %I%p %-d %%";
        let cases = [
            (0, "01 Jan 1970 January 01/70 Thursday Thu 001 00:00:00 12AM 1 %"),
            (951_827_696, "29 Feb 2000 February 02/00 Tuesday Tue 060 12:34:56 12PM 29 %"),
            (1_735_689_599, "31 Dec 2024 December 12/24 Tuesday Tue 366 23:59:59 11PM 31 %"),
            (1_740_787_200, "01 Mar 2025 March 03/25 Saturday Sat 060 00:00:00 12AM 1 %"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(strftime(format, seconds).unwrap(), expected);
        }
        assert_eq!(strftime("%Q", 0).unwrap_err(), "%Q");
    }
    /// Leap days exist in years that 4 divides, but of those that 100 divides only where 400 does.
    #[test]
    fn dates_are_days_of_the_calendar() {
        for text in ["1970-01-01", "2000-02-29", "2024-02-29", "2026-11-25", "2100-03-01", "0001-01-01", "9999-12-31"] {
            assert_eq!(text.parse::<Date>().unwrap().to_string(), text);
        }
        assert_eq!("2024-12-31".parse::<Date>().unwrap().days, 1_735_689_599 / 86_400);
        let others = [
            "2026-02-29",
            "2100-02-29",
            "2026-13-01",
            "2026-00-10",
            "2026-04-31",
            "2026-1-1",
            "25.11.2026",
            "",
            "2026-11-25 ",
            "+026-11-25",
            "99999999999999999-01-01",
            "2026-11-25-1",
            "-999-01-01",
        ];
        for text in others {
            let message = text.parse::<Date>().unwrap_err().to_string();
            let expected = format!("date = {text:?}: must be a day of the calendar, written as 2026-11-25");
            assert_eq!(message, expected);
        }
    }

    #[test]
    fn dates_are_written_as_text() {
        let date: Date = serde_json::from_str("\"2026-11-25\"").unwrap();
        assert_eq!(serde_json::to_string(&date).unwrap(), "\"2026-11-25\"");
        let message = serde_json::from_str::<Date>("\"tomorrow\"").unwrap_err().to_string();
        assert!(message.contains("date = \"tomorrow\": must be a day"), "{message}");
    }
}
