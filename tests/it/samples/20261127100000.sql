UPDATE quota SET limit_ = 7 WHERE resource = 'api_tokens';
