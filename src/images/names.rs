//! Users and groups of an image, from its own /etc/passwd and /etc/group.

use std::collections::BTreeMap;

/// Names of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageAccounts {
    users: BTreeMap<String, (u32, u32)>,
    groups: BTreeMap<String, Group>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    id: u32,
    members: Vec<String>,
}

impl ImageAccounts {
    /// Parses the two files (passwd(5), group(5)). The first line of a name counts.
    #[must_use]
    pub fn parse(passwd: &str, group: &str) -> Self {
        let mut names = Self::default();
        for line in passwd.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let [name, _, uid, gid, ..] = fields[..]
                && let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse())
            {
                names.users.entry(name.to_owned()).or_insert((uid, gid));
            }
        }
        for line in group.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let [name, _, gid, ref members @ ..] = fields[..]
                && let Ok(id) = gid.parse()
            {
                let members = members.first().into_iter().flat_map(|list| list.split(','));
                let members = members.filter(|name| !name.is_empty()).map(str::to_owned).collect();
                names.groups.entry(name.to_owned()).or_insert(Group { id, members });
            }
        }
        names
    }

    /// Returns the user and group id of a user.
    #[must_use]
    pub fn user(&self, name: &str) -> Option<(u32, u32)> {
        self.users.get(name).copied()
    }
    /// Returns the id of a group.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<u32> {
        self.groups.get(name).map(|group| group.id)
    }
    /// Returns the group of the user with this id.
    #[must_use]
    pub fn group_of(&self, uid: u32) -> Option<u32> {
        self.users.values().find(|(own, _)| *own == uid).map(|(_, gid)| *gid)
    }
    /// Returns name and id of the groups that list a user of this id as a member.
    #[must_use]
    pub fn groups_of(&self, uid: u32) -> Vec<(&str, u32)> {
        let own = |member: &String| self.users.get(member).is_some_and(|(id, _)| *id == uid);
        let groups = self.groups.iter().filter(|(_, group)| group.members.iter().any(own));
        groups.map(|(name, group)| (name.as_str(), group.id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_of_a_name_counts() {
        let names = ImageAccounts::parse("app:x:7:8:\napp:x:9:9:\nbad\n", "crew:x:8:\nother:x:y:");
        assert_eq!(names.user("app"), Some((7, 8)));
        assert_eq!(names.group_of(7), Some(8));
        assert_eq!((names.group("crew"), names.group("other")), (Some(8), None));
        let names =
            ImageAccounts::parse("app:x:7:8:\nalso:x:7:8:\n", "a:x:20:app\nb:x:21:x,also\nc:x:22:\nd:x:23");
        assert_eq!(names.groups_of(7), [("a", 20), ("b", 21)]);
    }
}
