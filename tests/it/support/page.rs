//! Reads pages and writes forms as a browser does.

/// Returns the token in a page's forms.
pub(crate) fn form_token(page: &str) -> String {
    let rest = page.split("name=\"form\" value=\"").nth(1).expect("the page has a form with a token");
    rest.split('"').next().unwrap().to_owned()
}

/// Returns the secrets that a page shows once.
pub(crate) fn secrets(page: &str) -> Vec<String> {
    let texts = page.split("<pre class=\"secret\"><code>").skip(1);
    texts.map(|text| text.split('<').next().unwrap().to_owned()).collect()
}

/// Returns form fields in their wire format.
pub(crate) fn form(fields: &[(&str, &str)]) -> String {
    let encode = |text: &str| {
        text.bytes()
            .map(|byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02X}")
                }
            })
            .collect::<String>()
    };
    fields
        .iter()
        .map(|(name, value)| format!("{}={}", encode(name), encode(value)))
        .collect::<Vec<_>>()
        .join("&")
}
