
¨ ®ßu‹…æABCDEFGHIJKLMNOPQRSTUVWX∞¶Ω¶6ÇÑ<;ôiïã•ç∞L0%